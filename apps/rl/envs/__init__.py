"""Environments drawn with NumPy, and adapters that make any Gymnasium environment one of pixels or states."""

"""Trained models in deployable forms, each compared with PyTorch before it is called done."""

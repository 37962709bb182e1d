"""Model to model: from dense layers to experts."""

from moecore.transforms.upcycle import split, upcycle

__all__ = ["split", "upcycle"]

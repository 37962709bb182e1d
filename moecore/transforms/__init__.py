"""Model to model: from dense layers to experts, and to fewer of them."""

from moecore.transforms.prune import prune
from moecore.transforms.upcycle import split, upcycle

__all__ = ["prune", "split", "upcycle"]

"""Applications on moecore, run from a checkout: `python -m apps.vision train`."""

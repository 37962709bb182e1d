"""Time an MoE layer beside a dense FFN of equal active multiply-adds: `python -m moecore.benchmark`."""

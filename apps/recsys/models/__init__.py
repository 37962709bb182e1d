"""Ranking models, plain `nn.Module`s on moecore blocks. No Lightning here."""

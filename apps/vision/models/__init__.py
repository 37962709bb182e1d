"""Models of the vision app, plain `nn.Module`s."""

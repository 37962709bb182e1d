"""Several tasks on one backbone: M³ViT and its data, training, measures and reports."""

"""``torch.optim.Optimizer`` faces."""

"""The DMV network in plain PyTorch."""

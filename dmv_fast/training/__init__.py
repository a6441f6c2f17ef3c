"""Data, augmentation, loss and loop."""

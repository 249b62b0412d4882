"""What must not change the training."""

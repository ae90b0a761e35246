"""Loss, gradient norm, optimizer and learning rate."""

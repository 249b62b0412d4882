"""What a step communicates and costs as ranks, classes, batch and nodes grow."""

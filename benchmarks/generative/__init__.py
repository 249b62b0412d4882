"""Do deep blocks that supervise shallow ones help a network to draw."""

"""KDEP and DoGo, pre-training without labels, on real CIFAR."""

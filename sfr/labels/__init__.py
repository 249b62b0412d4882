"""The label term: cross-entropy towards the labels, and towards what the network itself says of them."""

from sfr.labels.smoothing import DynamicLabelSmoothing, smooth_labels

__all__ = ["DynamicLabelSmoothing", "smooth_labels"]

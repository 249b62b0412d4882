"""Nodes of different widths -> nodes of one width, without parameters: many-to-one over channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfr.checks import check_floating, check_number
from sfr.config import Grouping


def channel_segments(nodes: Tensor, channels: int) -> Tensor:
    """Cut the channels of nodes into segments of `channels` consecutive ones (many-to-one; our reading).

    There are ``G = C // channels`` segments. If C is not a multiple of `channels`, the channels are first
    average-pooled to ``G * channels``.

    Args:
        nodes: local features, shape (B, N, C).
        channels: channels per segment, 1 <= channels <= C.

    Returns:
        Segments of shape (B, G, N, channels).

    Raises:
        TypeError: if the nodes are no floating-point tensor, or `channels` is no integer.
        ValueError: if the nodes have another number of axes, or `channels` is not in [1, C].

    Example:
        >>> import torch
        >>> channel_segments(torch.zeros(2, 5, 64), 16).shape
        torch.Size([2, 4, 5, 16])
    """
    check_floating("nodes", nodes)
    if nodes.ndim != 3:
        raise ValueError(f"nodes must have shape (B, N, C); got {tuple(nodes.shape)}")
    batch, count, width = nodes.shape
    check_number("channels", channels, 1, width, whole=True)
    groups = width // channels
    if groups * channels != width:
        nodes = F.adaptive_avg_pool1d(nodes, groups * channels)
    return nodes.reshape(batch, count, groups, channels).transpose(1, 2)


def match_channels(shallow: Tensor, deep: Tensor, grouping: Grouping) -> tuple[Tensor, Tensor]:
    """Bring a pair of nodes to the same number of channels without any parameter.

    The deep nodes are cut into G segments as wide as the shallow ones (:func:`channel_segments`). If the deep
    map is the narrower one, the shallow nodes are cut and averaged instead, and G = 1.

    Args:
        shallow: nodes of shape (B, N, C).
        deep: nodes of shape (B, M, D).
        grouping: "segments": one problem per segment; "mean": one, against the mean of the segments; "crop": one, of
            the first min(C, D) channels of both.

    Returns:
        Nodes (B * G, N, min(C, D)) and (B * G, M, min(C, D)), the G problems of an image next to each other.
    """
    width = min(shallow.shape[2], deep.shape[2])
    if grouping == "crop":
        return shallow[:, :, :width], deep[:, :, :width]
    if width < shallow.shape[2]:
        shallow = channel_segments(shallow, width).mean(dim=1)
    if deep.shape[2] == width:
        return shallow, deep
    segments = channel_segments(deep, width)
    if grouping == "mean":
        return shallow, segments.mean(dim=1)
    groups = segments.shape[1]
    return shallow.repeat_interleave(groups, dim=0), segments.flatten(0, 1)

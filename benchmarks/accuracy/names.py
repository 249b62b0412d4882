"""The methods that are compared, by the names that cells have them under, and what the tables call them."""

from __future__ import annotations

from collections.abc import Iterable

BASE, OURS = "vanilla", "sfr"
SMOOTHED = "sfr@smoothing=class_mean"
# The default before the gate.
UNGATED, UNGATED_SMOOTHED = "sfr@gate=none", "sfr@gate=none,smoothing=class_mean"
# The default up to here, and its parts: most of what has been measured.
EARLIER = "sfr@cost=sqeuclidean,weight=0.2,smoothing=class_mean"
FEATURES = "sfr@cost=sqeuclidean,weight=0.2"
PAST = "sfr@smoothing=past,alpha=0,alpha_end=0.8,cost=sqeuclidean,weight=0.2"
FEW_LABELS, NOISY_LABELS = "sfr@preset=few-labels", "sfr@preset=noisy-labels"
FEW_LABELS_UNGATED = "sfr@preset=few-labels,gate=none"
# What the preset for wrong labels is without the feature term; and what it was before, with and without it: past
# predictions whose alpha rises in the first quarter of `noise40-500`.
NOISY_ALONE = "sfr@preset=noisy-labels,feature_weight=0"
NOISY_PAST = "sfr@smoothing=past,alpha=0,alpha_end=0.8,alpha_steps=975,gate=fitted"
NOISY_PAST_ALONE = f"{NOISY_PAST},feature_weight=0"
# By the size of the images: vanilla for as long as sfr takes.
LONGER = {32: "vanilla-longer@factor=1.02", 16: "vanilla-longer@factor=1.1"}
PEERS = {
    BASE: "vanilla",
    LONGER[32]: "vanilla, 2 % longer",
    LONGER[16]: "vanilla, 10 % longer",
    "label-smoothing": "label smoothing 0.1",
    "online-label-smoothing": "online label smoothing",
    "tf-kd-reg": "Tf-KD_reg",
    "cs-kd": "CS-KD",
    "ps-kd": "PS-KD",
    "dlb": "DLB",
    "byot": "BYOT",
    "tfd": "TFD",
    "cutmix": "CutMix",
    OURS: "**sfr**",
    SMOOTHED: "**sfr**, class means",
    UNGATED: "**sfr**, without the gate",
    UNGATED_SMOOTHED: "**sfr**, class means, without the gate",
    EARLIER: "**sfr**, earlier default",
    FEATURES: "**sfr**, earlier default's features alone",
    PAST: "**sfr**, earlier default with past predictions",
    FEW_LABELS: "**sfr**, preset few-labels (past predictions)",
    FEW_LABELS_UNGATED: "**sfr**, preset few-labels without the gate",
    "sfr-cutmix@cost=sqeuclidean,weight=0.2,smoothing=class_mean": "**sfr**, earlier default + CutMix",
}
LADDER = {
    BASE: "vanilla",
    "tfd@weight=0.2,max_grid=4": "plain l2, channel to channel",
    "sfr@grouping=crop,cost=sqeuclidean,weight=0.2": "EMD-l2, channel to channel",
    "tfd@weight=0.2,max_grid=4,grouping=mean": "plain l2, many to one (mean)",
    FEATURES: "EMD-l2, many to one (mean)",
    "sfr@grouping=segments,cost=sqeuclidean,weight=0.2": "EMD-l2, many to one (segments)",
    "sfr@weight=0,cost=sqeuclidean,smoothing=class_mean": "dynamic label smoothing alone",
    EARLIER: "**sfr**, earlier default: both",
    PAST: "the same with past predictions instead of class means",
    OURS: "**sfr**: cosine, many to one (mean)",
    "cutmix": "CutMix",
    "sfr-cutmix@cost=sqeuclidean,weight=0.2,smoothing=class_mean": "**sfr**, earlier default + CutMix",
}
WRONG_LABELS = {
    BASE: "vanilla",
    "label-smoothing": "label smoothing 0.1",
    "elr": "ELR",
    NOISY_ALONE: "**sfr**, preset noisy-labels without the feature term",
    NOISY_LABELS: "**sfr**, preset noisy-labels (early learning)",
}
WRONG_LABELS_EARLIER = {
    NOISY_PAST_ALONE: "past predictions",
    NOISY_PAST: "**sfr** with past predictions",
}
FINE_TUNING = {
    BASE: "vanilla",
    "label-smoothing": "label smoothing 0.1",
    "l2-sp": "L2-SP",
    OURS: "**sfr**",
    "sfr-slow@decay=0.99,rising=False": "**sfr**, supervised by an average from the pretrained weights on",
}
NAMES = LADDER | PEERS | WRONG_LABELS | WRONG_LABELS_EARLIER | FINE_TUNING


def comparable(arms: Iterable[str], image_size: int) -> list[str]:
    """Return `arms` without those that train for as long as sfr takes on images of another size."""
    return [arm for arm in arms if arm not in LONGER.values() or arm == LONGER.get(image_size)]

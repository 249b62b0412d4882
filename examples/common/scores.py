"""Accuracy, top-5 accuracy, calibration error and cross-entropy of logits, in NumPy alone."""

import numpy as np
from numpy.typing import NDArray

BINS = 15


def classification_scores(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, top-5 accuracy, expected calibration error and cross-entropy of logits (N, K) and labels (N,)."""
    log_probabilities = log_softmax(logits)
    correct = log_probabilities.argmax(axis=1) == labels
    confidence = np.exp(log_probabilities.max(axis=1))
    return {
        "accuracy": float(correct.mean()),
        "top5": top_k_accuracy(logits, labels, 5),
        "ece": expected_calibration_error(confidence, correct),
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
    }


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def top_k_accuracy(logits: NDArray[np.float64], labels: NDArray[np.int64], k: int) -> float:
    """Share of the rows whose label is among the k largest logits."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def expected_calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al., arXiv 1706.04599).

    Bin i holds the confidences in (i / bins, (i + 1) / bins].
    """
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))

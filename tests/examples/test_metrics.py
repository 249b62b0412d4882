"""The metric agrees with plain loops and needs no network."""

import math

import numpy as np
import pytest

from common.metrics import ClassificationMetric
from common.scores import expected_calibration_error


def plain_metrics(logits, labels):
    """Accuracy, top-5, calibration error in 15 bins and cross-entropy, sample by sample."""
    right = top5 = loss = 0.0
    bins = [[] for _ in range(15)]
    for row, label in zip(logits, labels, strict=True):
        total = sum(math.exp(value) for value in row)
        probabilities = [math.exp(value) / total for value in row]
        ranked = sorted(range(len(row)), key=lambda k: -row[k])
        right += ranked[0] == label
        top5 += label in ranked[:5]
        loss -= math.log(probabilities[label])
        confidence = max(probabilities)
        for i in range(15):
            if i / 15 < confidence <= (i + 1) / 15:
                bins[i].append((confidence, ranked[0] == label))
    gaps = [
        len(members) * abs(np.mean([c for c, _ in members]) - np.mean([r for _, r in members]))
        for members in bins
        if members
    ]
    count = len(labels)
    return {
        "accuracy": right / count,
        "top5": top5 / count,
        "ece": sum(gaps) / count,
        "loss": loss / count,
    }


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_equals_a_plain_computation(scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(200, 20))).astype(np.float32)
    labels = np.where(rng.random(200) < 0.5, logits.argmax(1), rng.integers(0, 20, 200))
    metric = ClassificationMetric(keep_in_memory=True)
    for start in range(0, 200, 64):
        metric.add_batch(predictions=logits[start : start + 64], references=labels[start : start + 64])
    assert metric.compute() == pytest.approx(plain_metrics(logits.tolist(), labels.tolist()))


def test_large_logits_give_a_finite_loss():
    metric = ClassificationMetric(keep_in_memory=True)
    metric.add_batch(predictions=[[1e4, -1e4], [1e4, -1e4]], references=[0, 1])
    assert metric.compute() == pytest.approx({"accuracy": 0.5, "top5": 1.0, "ece": 0.5, "loss": 1e4})


def test_calibration_is_perfect_where_confidence_equals_accuracy():
    confidence = np.full(10, 0.7)
    correct = np.arange(10) < 7
    assert expected_calibration_error(confidence, correct) == pytest.approx(0)
    assert expected_calibration_error(confidence, ~correct) == pytest.approx(0.4)

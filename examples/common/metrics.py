"""Accuracy, top-5 accuracy, calibration error and cross-entropy as one `evaluate` metric that needs no network."""

from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

from .scores import classification_scores


class ClassificationMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """What `evaluate.load` would fetch from the Hub, defined here; predictions are logits.

    Example:
        >>> metric = ClassificationMetric(keep_in_memory=True)
        >>> metric.add_batch(predictions=[[2.0, 0.0], [0.0, 1.0]], references=[0, 0])
        >>> round(metric.compute()["accuracy"], 2)
        0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, top-5 accuracy, expected calibration error, cross-entropy.",
            citation="",
            features=Features({"predictions": Sequence(Value("float32")), "references": Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return classification_scores(np.asarray(predictions, dtype=np.float64), np.asarray(references))

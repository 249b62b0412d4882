"""ClassMeans: what the network says of each class, over the samples that it classifies correctly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from sfr.label_switches import Update
from sfr.labels.source import Batch, check_sound
from sfr.labels.targets import rows_of

# Above so many classes a step exchanges and updates only the rows of S whose class was seen. The host of an accelerator
# has to wait to know which, and is spared that as long as the whole of S is a small message (16 MiB).
ALL_ROWS_UP_TO = 2048
ALL_ROWS_ON_CPU_UP_TO = 128

STATISTICS = ("distributions", "sums", "counts")


class ClassMeans:
    """S, one distribution per class, the same on all ranks: a source of smoothed targets.

    Args:
        momentum, update, sync: see :class:`sfr.DynamicLabelSmoothing`.

    Attributes:
        distributions: S, shape (K, K); (0, 0) until K is known from the first logits or a state.
        counts: correct samples seen of each class, (K,); with "epoch", in this epoch.
        sums: with "epoch", the sums of their distributions in this epoch, (K, K).

    Reference:
        Zhang et al., Delving Deep into Label Smoothing, arXiv 2011.12562.
    """

    distributions: Tensor
    sums: Tensor
    counts: Tensor
    expected_classes: int | None = None  # K, if it is to be known before the first logits

    def __init__(self, momentum: float = 0.01, update: Update = "running", sync: bool = True) -> None:
        self.momentum, self.update, self.sync = momentum, update, sync
        self.forget()

    def forget(self) -> None:
        """Start the statistics anew."""
        self.distributions, self.sums, self.counts = torch.empty(0, 0), torch.empty(0, 0), torch.empty(0)

    def check(self, logits: Tensor, target: Tensor, index: Tensor | None) -> None:
        """Raise a ``ValueError`` if the statistics are of another number of classes."""
        if len(self.distributions) not in (0, logits.shape[1]):
            raise ValueError(
                f"the label statistics are of {len(self.distributions)} classes; the logits have {logits.shape[1]}. "
                "For a model with another head make a new criterion"
            )

    def recall(self, batch: Batch) -> Tensor:
        """Return S[y] of each row, (N, K), or mixtures of its rows by soft targets."""
        self.prepare(batch.log_probabilities)
        return rows_of(batch.labels, self.distributions)

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        """Add the correctly classified samples of all ranks to the statistics."""
        self.prepare(batch.log_probabilities)
        label = batch.labels.argmax(dim=1) if batch.kept is None else batch.labels.where(batch.kept, -1)
        largest, predicted = batch.log_probabilities.max(dim=1)
        # NaN is the largest of a row that holds one: a prediction that is not finite is not correct.
        label = label.where((predicted == label) & ~largest.isnan(), -1)
        classes = self._classes_seen(label)
        sums, counts = _class_sums(batch.log_probabilities, label, classes, batch.images)
        of_all_ranks = torch.cat([sums, counts[:, None]], dim=1)
        self.sum_over_ranks(of_all_ranks)
        self._move(classes, of_all_ranks[:, :-1], of_all_ranks[:, -1])

    def _move(self, classes: Tensor, sums: Tensor, counts: Tensor) -> None:
        total = self.counts.index_select(0, classes) + counts
        self.counts.index_copy_(0, classes, total)
        if self.update == "epoch":
            self.sums.index_add_(0, classes, sums)
            return
        # A plain mean of the first 1/momentum samples of a class, an exponential one from there on.
        share = torch.maximum(1 - (1 - self.momentum) ** counts, counts / total.clamp_min(1))
        means = sums / counts.clamp_min(1)[:, None]
        moved = self.distributions.index_select(0, classes).lerp(means, share[:, None])
        self.distributions.index_copy_(0, classes, moved)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """With "epoch", replace S by the means of the epoch; a class without a correct sample keeps its row."""
        if self.update != "epoch" or not len(self.distributions):
            return
        seen = (self.counts > 0)[:, None]
        means = self.sums / self.counts.clamp_min(1)[:, None]
        self.distributions.copy_(torch.where(seen, means, self.distributions))
        self.sums.zero_()
        self.counts.zero_()

    def prepare(self, like: Tensor) -> None:
        """Create the statistics for the first logits, or bring restored ones to their device and dtype."""
        with torch.inference_mode(False):  # tensors made inside it could not be written into outside
            if not len(self.distributions):
                self._set(self.beginning(like.shape[1], like))
            elif (self.distributions.device, self.distributions.dtype) != (like.device, like.dtype):
                self._set({name: getattr(self, name).to(like) for name in STATISTICS})

    def beginning(self, classes: int, like: Tensor) -> dict[str, Tensor]:
        """Return the statistics of no sample."""
        statistics = {"distributions": like.new_full((classes, classes), 1.0 / classes)}
        if self.update == "epoch":
            statistics["sums"] = like.new_zeros(classes, classes)
        return {**statistics, "counts": like.new_zeros(classes)}

    def _set(self, statistics: Mapping[str, Tensor]) -> None:
        for name, value in statistics.items():
            setattr(self, name, value)

    def _classes_seen(self, label: Tensor) -> Tensor:
        """Return the classes whose statistics this step may move, the same on all ranks."""
        number = len(self.distributions)
        if number <= (ALL_ROWS_ON_CPU_UP_TO if label.device.type == "cpu" else ALL_ROWS_UP_TO):
            return torch.arange(number, device=label.device)
        seen = torch.bincount(label + 1, minlength=number + 1)[1:]
        self.sum_over_ranks(seen)
        return seen.nonzero().squeeze(1)

    def sum_over_ranks(self, values: Tensor) -> None:
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)

    def state(self) -> dict[str, Tensor]:
        """Return the statistics, if the number of classes is known."""
        statistics = {name: getattr(self, name) for name in STATISTICS if len(getattr(self, name))}
        if not statistics and self.expected_classes is not None:
            return self.beginning(self.expected_classes, like=torch.empty(0))
        return statistics

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over statistics as :meth:`state` returns them; with "epoch", those of running means begin an epoch.

        Raises:
            ValueError: if they are damaged.
        """
        self.forget()
        found = {name: state[name] for name in STATISTICS if name in state and state[name].numel()}
        for name, value in found.items():
            check_sound(
                name, value, axes=1 if name == "counts" else 2, sums=(1, 1) if name == "distributions" else None
            )
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if len({size for shape in shapes.values() for size in shape}) > 1:
            raise ValueError(
                f"the label statistics are damaged: of K classes they have (K, K) and counts (K,); got {shapes}"
            )
        if self.update == "running":
            found.pop("sums", None)
        elif "distributions" in found and "sums" not in found:
            found = self.beginning(len(found["distributions"]), found["distributions"]) | found
            found["counts"] = torch.zeros_like(found["counts"])
        self._set(found)


def _class_sums(log_probabilities: Tensor, label: Tensor, classes: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return sum (M, K) and number (M,) of the samples of each of the M `classes`, given N rows; -1 is no sample.

    With one row an image each is a sample; else an image is a sample of each class in it, with the mean of its rows.
    """
    if len(label) == images:
        return _row_sums(log_probabilities, label, classes)
    sums = log_probabilities.new_zeros(len(classes), log_probabilities.shape[1])
    counts = log_probabilities.new_zeros(len(classes))
    # One image at a time: the memberships of a whole batch would be as large as its logits.
    for rows, labels in zip(log_probabilities.chunk(images), label.chunk(images), strict=True):
        image_sums, positions = _row_sums(rows, labels, classes)
        sums += image_sums / positions.clamp_min(1)[:, None]
        counts += positions > 0
    return sums, counts


def _row_sums(log_probabilities: Tensor, label: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the probabilities (M, K) and the number (M,) of the rows of each class."""
    members = (classes[:, None] == label).to(log_probabilities.dtype)
    # What is no sample may be NaN, and must not reach the sums even times zero.
    probabilities = torch.where((label >= 0)[:, None], log_probabilities.exp(), 0.0)
    return members @ probabilities, members.sum(dim=1)

"""PastPredictions: what the network has said of each training sample so far, a source of smoothed targets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sfr.checks import check_number, plain_number
from sfr.label_switches import check_momentum
from sfr.labels.source import Batch, check_sound
from sfr.state import TensorState

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PastPredictions(TensorState):
    """A table of one distribution per training sample, the same on all ranks.

    It takes ``2 * num_samples * K`` bytes on the device of the logits, for K classes, and as much in a checkpoint.

    Args:
        num_samples: samples of the training set, >= 1.
        sync: take over what the other ranks of ``torch.distributed`` said: K + 1 numbers for each sample of a step. The
            ranks may have different numbers of samples, for which the host waits.
        momentum: weight of the newest prediction, in (0, 1]; the older ones fade by what it leaves. 1 keeps the last
            alone. The table is in half precision, which loses what a momentum far below 0.01 adds in one step.

    Raises:
        TypeError, ValueError: for a number of samples that is none, or a momentum out of range.

    Example:
        >>> past = PastPredictions(num_samples=3)
        >>> past.remember(torch.tensor([2]), torch.tensor([[0.25, 0.75]]))
        >>> past.said(torch.tensor([2, 0]), otherwise=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [1.0000, 0.0000]])
    """

    state_names = ("table",)
    table: Tensor
    expected_classes: int | None = None  # K, if it is to be known before the first distributions

    def __init__(self, num_samples: int, sync: bool = True, momentum: float = 1.0) -> None:
        super().__init__()
        check_number("num_samples", num_samples, 1, whole=True)
        check_momentum(momentum)
        self.num_samples, self.sync, self.momentum = plain_number(num_samples), sync, momentum
        self._forget()

    def _forget(self) -> None:
        self.table = torch.empty(0, 0, dtype=torch.float16)  # (num_samples, K) once K is known

    def check(self, logits: Tensor, target: Tensor, index: Tensor | None) -> None:
        """Raise a ``TypeError`` or ``ValueError`` that says what does not fit."""
        if logits.ndim != 2 or target.is_floating_point():
            raise ValueError(
                "the term of past predictions needs logits of shape (B, K) and class indices: a mixed image has no "
                f"past; got logits {tuple(logits.shape)} and a {target.dtype} target"
            )
        samples = len(logits)
        if index is None:
            raise ValueError(
                "past predictions need to know which samples these are: criterion(logits, target, index=index). "
                "torch.utils.data.StackDataset(dataset, range(len(dataset))) gives each sample with its number."
            )
        if not isinstance(index, Tensor) or index.dtype not in INTEGERS:
            raise TypeError(f"index must be a tensor of integers; got {getattr(index, 'dtype', type(index).__name__)}")
        if index.shape != (samples,):
            raise ValueError(f"index must have shape ({samples},), one number per sample; got {tuple(index.shape)}")
        if index.device.type == "cpu" and len(index) and not 0 <= index.min() <= index.max() < self.num_samples:
            raise ValueError(
                f"index must lie in [0, {self.num_samples - 1}], as num_samples={self.num_samples} says; "
                f"got values from {index.min().item()} to {index.max().item()}"
            )

    def recall(self, batch: Batch) -> Tensor:
        """Return what was said of each sample, (B, K); of one of which nothing was yet, its one-hot label."""
        onehot = F.one_hot(batch.labels, batch.log_probabilities.shape[1]).to(batch.log_probabilities)
        return self.said(_numbers_of(batch), otherwise=onehot)

    def observe(self, batch: Batch) -> None:
        """Keep what is said of each sample."""
        self.remember(_numbers_of(batch), batch.log_probabilities.detach().exp())

    def running_means(self, batch: Batch) -> Tensor:
        """Return the running mean of what was said of each sample, (B, K); a row sums to less than 1 at first."""
        return self.table[_numbers_of(batch).to(self.table.device)].to(batch.log_probabilities.dtype)

    def said(self, index: Tensor, otherwise: Tensor) -> Tensor:
        """Return what was said of the samples `index` (B,), rows of `otherwise` (B, K) where nothing was yet.

        The weights of what was said sum to less than 1 at first, hence the division.
        """
        self.prepare(otherwise)
        said = self.table[index.to(self.table.device)].to(otherwise.dtype)
        total = said.sum(dim=1, keepdim=True)
        return torch.where(total > 0, said / total, otherwise)

    @torch.no_grad()
    def remember(self, index: Tensor, probabilities: Tensor) -> None:
        """Take in what is said, (B, K), of the samples `index` (B,); nothing of those for which it is not finite.

        What is said last of a sample that is there more than once is kept, by the order of the rows and of the ranks.
        """
        self.prepare(probabilities)
        index, said = index.to(self.table.device), probabilities.to(self.table.dtype)
        if self.sync and dist.is_available() and dist.is_initialized():
            index, said = _rows_of_all_ranks(index, said)
        order = index.argsort(stable=True)
        index = index[order]
        # All rows of one sample write the same, its last: which of them writes last makes no difference.
        last = torch.searchsorted(index, index, right=True) - 1
        newest, before = said[order[last]].float(), self.table[index].float()
        newest = newest.where(newest.isfinite().all(dim=1, keepdim=True), before)
        self.table[index] = before.lerp(newest, self.momentum).to(self.table.dtype)

    def prepare(self, like: Tensor) -> None:
        """Create the table for the first distributions, or bring a restored one to their device."""
        with torch.inference_mode(False):  # a tensor made inside it could not be written into outside
            if not len(self.table):
                self.table = self._beginning(like.shape[1])
            self.table = self.table.to(like.device)
        expected = (self.num_samples, like.shape[1])
        if self.table.shape != expected:
            raise ValueError(
                f"the past predictions are of shape {tuple(self.table.shape)}, not {expected}. For another training "
                "set or a model with another head make a new criterion"
            )

    def _beginning(self, classes: int) -> Tensor:
        return torch.zeros(self.num_samples, classes, dtype=torch.float16)

    def tensor_state(self) -> dict[str, Tensor]:
        """Return the table, if the number of classes is known."""
        if len(self.table):
            return {"table": self.table}
        return {} if self.expected_classes is None else {"table": self._beginning(self.expected_classes)}

    def load_tensor_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the table; called by ``load_state_dict``.

        Raises:
            ValueError: if it is damaged.
        """
        self._forget()
        if "table" in state and state["table"].any():
            check_sound("table", state["table"], axes=2, sums=(0, 1))
            self.table = state["table"]

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}"


def _numbers_of(batch: Batch) -> Tensor:
    """Return the numbers of the samples of a batch that has passed the check, int64."""
    assert batch.numbers is not None
    return batch.numbers.long()


def _rows_of_all_ranks(*tensors: Tensor) -> list[Tensor]:
    """Return each tensor with the rows of all ranks, in the order of the ranks, which may have different numbers."""
    ranks = dist.get_world_size()

    def gathered(values: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(values) for _ in range(ranks)]
        dist.all_gather(parts, values.contiguous())
        return parts

    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = torch.cat(gathered(own)).tolist()  # the host waits once, however many ranks there are
    result = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        result.append(torch.cat([part[:count] for part, count in zip(gathered(padded), counts, strict=True)]))
    return result

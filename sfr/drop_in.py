"""DropInLoss: a loss that loops call as they call nn.CrossEntropyLoss, Hugging Face's Trainer among them."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from sfr.arguments import MEAN
from sfr.compiling import eager
from sfr.config import IGNORE_INDEX
from sfr.state import TensorState

INDEX_BY_NAME = (
    "criterion(output, target) takes no third argument by position; numbers of samples are passed by name: "
    "criterion(output, target, index=index)"
)


class DropInLoss(TensorState):
    """Base of a loss that is called as ``nn.CrossEntropyLoss`` is."""

    def _loss(self, output: Any, target: Any, index: Tensor | None) -> Tensor:
        """Return the loss of one batch, 0-d; see :meth:`forward`."""
        raise NotImplementedError

    @eager
    def forward(
        self,
        output: Any = None,
        target: Any = None,
        *misplaced: NoReturn,
        num_items_in_batch: Tensor | int | None = None,
        index: Tensor | None = None,
        input: Any = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss of one batch as a 0-d tensor.

        Args:
            output: output of the wrapped model for this batch: logits of shape (B, K), or (B, K, ...) with one
                prediction at each position, or a mapping that holds them as "logits" or "out" (Hugging Face's
                ``ModelOutput``, torchvision's segmentation models); whatever the `label_loss` takes, if there is one.
            target: class indices, shape (B,) or (B, ...), or soft targets of the shape of the logits; or whatever the
                `label_loss` takes.
            num_items_in_batch: entries of the targets, other than -100, in all the batches that one optimizer step
                accumulates: of soft targets K for each sample. The loss is then this batch's share of their mean.
                Hugging Face's ``Trainer(compute_loss_func=criterion)`` passes it.
            index: numbers of the samples in the training set, shape (B,), for ``smoothing="past"``; else of no effect.
                ``StackDataset(dataset, range(len(dataset)))`` of ``torch.utils.data`` gives each sample with its own.
            input: another name of `output`, that of ``nn.CrossEntropyLoss``.
            reduction: "mean" and no other, for callers that pass what a loss function takes.

        Raises:
            RuntimeError: if the features recorded are not those of the forward that gave the logits, inside a transform
                of ``torch.func``, or inside ``model.join()`` of DDP, if there is something to exchange between the
                ranks.
            TypeError, ValueError: for an output or target of the wrong kind, shape or range.
        """
        if misplaced:
            raise TypeError(INDEX_BY_NAME)
        if reduction != "mean":
            raise ValueError(f"the criterion takes no reduction={reduction!r}; {MEAN}")
        loss = self._loss(input if output is None else output, target, index)
        if num_items_in_batch is None:
            return loss
        if not isinstance(target, Tensor):
            raise TypeError(
                f"num_items_in_batch needs a target that is a tensor, whose entries count; got {type(target).__name__}"
            )
        # The Trainer counts the labels that are not -100, whatever is ignored here: only so the shares sum to one.
        return loss * ((target != IGNORE_INDEX).sum() / num_items_in_batch)

"""StepWarnings: warnings during training, each given once."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from sfr.feature.results import Terms
from sfr.parts import LossParts
from sfr.warn import warn_user

# How often the flag of non-finite features is read where that makes the host wait for the device.
CHECK_EVERY = 100
# A feature term that is more than this share of the loss for so many steps is warned of; where reading it makes the
# host wait, it is read as often as that. The label term counts as the largest so far, because it goes to zero once the
# labels are fitted, and then every feature term outweighs it.
LARGE_SHARE, LARGE_STEPS = 1 / 3, 50

NONFINITE = (
    "non-finite features at or before step {}: their images get a feature term of zero. Check the learning rate and, "
    "with float16, the loss scale."
)
LARGE = (
    "the feature term has been more than a third of the loss for {} steps. It may keep the network from learning its "
    "labels: lower feature_weight={}, or let it fall with feature_weight=sfr.Ramp(...)."
)
FROZEN = (
    "all the supervised stages are frozen: the feature term takes time and trains nothing. Unfreeze them, or train "
    "inside model.disable() as long as they are frozen."
)
EVALUATION = (
    "the criterion was called for a model in evaluation mode: the loss is the plain one, and neither step nor label "
    "statistics have moved. For a validation loss that is right, and criterion.eval() or torch.no_grad() says so. To "
    "train in evaluation mode (frozen batch normalisation), wrap with SFRWrapper(model, record_in_eval=True)."
)


class StepWarnings:
    """Looks at the steps of one criterion, and warns of each kind of trouble once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._finite: deque[Tensor] = deque(maxlen=CHECK_EVERY)  # of the steps not looked at yet
        self._large_since: int | None = None
        self._largest_label = 0.0

    def warn(self, message: str, *values: object) -> None:
        """Warn with one of the messages of this file, unless it was given before."""
        if message not in self._warned:
            self._warned.add(message)
            warn_user(message.format(*values))

    def see_terms(self, terms: Terms, step: int) -> None:
        """Warn if the terms train nothing, or an image's features are not finite.

        The latter is looked at seldom where that makes the host wait.
        """
        if not terms:
            return
        if not terms.by_image.requires_grad:
            self.warn(FROZEN)
        if NONFINITE in self._warned:
            return
        self._finite.append(terms.finite)
        if terms.finite.device.type != "cpu" and step % CHECK_EVERY:
            return
        if not all(finite.all() for finite in self._finite):
            self.warn(NONFINITE, step)
        self._finite.clear()

    def see_parts(self, parts: LossParts, step: int, stated: object) -> None:
        """Warn if the feature term, of the weight as it is `stated`, has been a large share of the loss for long."""
        if LARGE in self._warned or (parts.label.device.type != "cpu" and step % LARGE_STEPS):
            return
        self._largest_label = max(self._largest_label, float(parts.label))
        weighted = parts.weight * float(parts.feature)
        share = weighted / (weighted + self._largest_label) if weighted else 0.0
        if share <= LARGE_SHARE:
            self._large_since = None
        elif self._large_since is None:
            self._large_since = step
        if self._large_since is not None and step - self._large_since >= LARGE_STEPS - 1:
            self.warn(LARGE, LARGE_STEPS, stated)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_finite": deque(maxlen=CHECK_EVERY)}

"""StageSettings: what the user states about the stages and how their outputs are read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from sfr.checks import check_choice, check_number, items, plain_number
from sfr.config import Layout


@dataclass(frozen=True)
class StageSettings:
    """How a model is read; see :class:`sfr.SFRWrapper`.

    Args:
        stages: names of submodules, a regular expression that their full names match, or None to discover them.
        layout: memory layout of the stage outputs; "auto" infers it.
        prefix_tokens: tokens in front of a sequence that are dropped, >= 0; "auto" counts them.

    Raises:
        TypeError, ValueError: naming the field, the value got and what is allowed.
    """

    stages: str | Sequence[str] | None = None
    layout: Layout = "auto"
    prefix_tokens: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_choice("layout", self.layout, Layout)
        object.__setattr__(self, "prefix_tokens", plain_number(self.prefix_tokens))
        if self.prefix_tokens != "auto":
            check_number("prefix_tokens", self.prefix_tokens, 0, whole=True)
        if self.stages is not None and not isinstance(self.stages, str):
            stages = items("stages", self.stages)
            if not all(isinstance(name, str) for name in stages):
                kinds = ", ".join(type(name).__name__ for name in stages)
                raise TypeError(
                    "stages must be names as those of model.named_modules(), a regular expression or None; got a "
                    f"sequence of {kinds}"
                )
            object.__setattr__(self, "stages", stages)
        if self.layout in ("channels_first", "channels_last"):
            self.check_tokens([self.layout])

    def check_tokens(self, layouts: Collection[str]) -> None:
        """Raise a ``ValueError`` if prefix tokens are to be dropped of stages none of which gives tokens.

        Args:
            layouts: of the outputs of all stages.
        """
        if self.prefix_tokens not in ("auto", 0) and layouts and not {"tokens", "sequence_first"} & {*layouts}:
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} has no effect: the stages give no sequence of tokens but "
                f"{' and '.join(sorted({*layouts}))}. Leave it out, or name stages that give tokens"
            )

"""Why a forward has shown fewer than two stages, for the error that says so."""

from __future__ import annotations

from collections.abc import Sequence

from sfr.model.trace import Trace


def why_apart(names: Sequence[str]) -> str:
    """Return what is to be said of outputs that lie side by side, as the rest of a sentence; nothing without any."""
    if not names:
        return ""
    return f": none of {names} was computed from another, as far as the gradient goes, so that none is deeper"


def why_few(trace: Trace, left_out: Sequence[str]) -> str:
    """Return why there are so few stages, as the rest of a sentence; nothing if it is not known.

    Args:
        trace: the watched forward.
        left_out: notes on the stages whose map has a single cell.
    """
    if not trace.calls and not trace.without_gradient:
        return ": the forward has called none of its submodules, whose outputs the stages are"
    if not trace.sightings and not trace.without_gradient:
        return ": no submodule has returned a floating-point tensor; complex ones are no features"
    unread = [sighting for sighting in trace.sightings if sighting.problem]
    if unread:
        stated = "" if trace.layout == "auto" else f" with layout={trace.layout!r}"
        return f": {len(unread)} output(s) cannot be read{stated}; {unread[0].name!r}: {unread[0].problem}"
    others = [sighting for sighting in trace.sightings if sighting.view is None]
    if trace.sightings and len(others) == len(trace.sightings):
        name, shape = others[0].name, others[0].shape
        return f": no output has the batch, {trace.batch}, as its first axis: {name!r} has shape {shape}"
    if trace.without_gradient:
        return (
            f": {len(trace.without_gradient)} module(s) ran without gradient, as {trace.without_gradient[0]!r}. With "
            "gradient checkpointing pass use_reentrant=False; what runs under torch.no_grad() cannot be a stage"
        )
    weighty = {sighting.name for sighting in trace.sightings if any(True for _ in sighting.module.parameters())}
    repeated = [name for name, count in trace.calls.items() if count > 1 and name in weighty]
    if repeated:
        return (
            f": {len(repeated)} module(s) ran more than once in the forward, as {repeated[0]!r}, and a stage has "
            "to run once. A model that calls one encoder for several inputs can call it once, on torch.cat([a, b]), "
            "with its stages named"
        )
    if others:
        return (
            f": {len(others)} output(s) do not have the batch, {trace.batch}, as their first axis, as "
            f"{others[0].name!r} of shape {others[0].shape}, and are stages only if they are named"
        )
    return f": left out: {', '.join(left_out)}" if left_out else ""

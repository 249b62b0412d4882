"""The arms of the comparison, by name. Each is written from its paper and has a plain reference in the tests."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from benchmarks.accuracy.methods.arm import Arm, Task
from benchmarks.accuracy.methods.byot import BeYourOwnTeacher
from benchmarks.accuracy.methods.cs_kd import ClassWise
from benchmarks.accuracy.methods.cutmix import CutMix, SelfFeatureCutMix
from benchmarks.accuracy.methods.dlb import LastMiniBatch
from benchmarks.accuracy.methods.elr import EarlyLearning
from benchmarks.accuracy.methods.gated_labels import GatedLabels
from benchmarks.accuracy.methods.l2_sp import L2StartingPoint
from benchmarks.accuracy.methods.label_smoothing import LabelSmoothing
from benchmarks.accuracy.methods.online_label_smoothing import OnlineLabelSmoothing
from benchmarks.accuracy.methods.ps_kd import Progressive
from benchmarks.accuracy.methods.self_feature import SelfFeature
from benchmarks.accuracy.methods.slow_supervisor import SlowSupervisor
from benchmarks.accuracy.methods.tf_kd import VirtualTeacher
from benchmarks.accuracy.methods.tfd import TeacherFreeFeatureDistillation
from benchmarks.accuracy.methods.vanilla_longer import VanillaLonger

METHODS: dict[str, type[Arm]] = {
    "vanilla": Arm,
    "vanilla-longer": VanillaLonger,
    "label-smoothing": LabelSmoothing,
    "online-label-smoothing": OnlineLabelSmoothing,
    "tf-kd-reg": VirtualTeacher,
    "cs-kd": ClassWise,
    "ps-kd": Progressive,
    "elr": EarlyLearning,
    "l2-sp": L2StartingPoint,
    "dlb": LastMiniBatch,
    "byot": BeYourOwnTeacher,
    "tfd": TeacherFreeFeatureDistillation,
    "cutmix": CutMix,
    "sfr": SelfFeature,
    "sfr-cutmix": SelfFeatureCutMix,
    "sfr-slow": SlowSupervisor,
    "sfr-gated": GatedLabels,
}


def build_arm(spec: str, task: Task) -> Arm:
    """Return the arm called `spec`: a method's name, and after an @ its options, as in "sfr@weight=0.2,pairs=last"."""
    name, options = parse_arm(spec)
    return METHODS[name](task, **options)


def parse_arm(spec: str) -> tuple[str, dict[str, Any]]:
    """Split "method@key=value,key=value" into the method's name and its options.

    Raises:
        ValueError: for an unknown method or an option without a value.
    """
    name, _, listed = spec.partition("@")
    if name not in METHODS:
        raise ValueError(f"no arm is called {name!r}; there are {', '.join(METHODS)}")
    options = {}
    for option in filter(None, listed.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"arm {spec!r}: {option!r} is not key=value")
        options[key] = literal(value)
    return name, options


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def known_arm(spec: str) -> str:
    """Return an arm of the command line as it is, or refuse it."""
    try:
        parse_arm(spec)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return spec

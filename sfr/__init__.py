"""sfr: deep features of a network supervise its own shallow ones, in two lines of any PyTorch training loop."""

from sfr import plot, transport
from sfr.config import Ramp, SFRConfig
from sfr.criterion import SFRLoss
from sfr.feature.channels import channel_segments
from sfr.feature.emd import EMDL2Loss, emd_l2
from sfr.labels import DynamicLabelSmoothing, smooth_labels
from sfr.parts import LossParts
from sfr.wrapper import SFRWrapper, unwrap

__version__ = "0.1.0"

__all__ = [
    "DynamicLabelSmoothing",
    "EMDL2Loss",
    "LossParts",
    "Ramp",
    "SFRConfig",
    "SFRLoss",
    "SFRWrapper",
    "channel_segments",
    "emd_l2",
    "plot",
    "smooth_labels",
    "transport",
    "unwrap",
]

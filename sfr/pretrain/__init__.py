"""Pre-training without labels: the sibling methods KDEP (from a teacher) and DoGo (two networks teach each other)."""

from sfr.pretrain.dogo import DoGoLoss
from sfr.pretrain.kdep import Alignment, KDEPLoss, fit_alignment, power_temperature_scaling
from sfr.pretrain.networks import TwoViewNetwork, encoder_of, simclr_projector, simsiam_predictor, simsiam_projector
from sfr.pretrain.pooled import PooledFeatures
from sfr.pretrain.view_losses import nt_xent, similarity_kl, simsiam

__all__ = [
    "Alignment",
    "DoGoLoss",
    "KDEPLoss",
    "PooledFeatures",
    "TwoViewNetwork",
    "encoder_of",
    "fit_alignment",
    "nt_xent",
    "power_temperature_scaling",
    "simclr_projector",
    "similarity_kl",
    "simsiam",
    "simsiam_predictor",
    "simsiam_projector",
]

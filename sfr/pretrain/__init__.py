"""Pre-training without labels: the sibling methods KDEP (from a teacher) and DoGo (two networks teach each other)."""

from sfr.pretrain.dogo import DoGoLoss, nt_xent, similarity_kl, simsiam
from sfr.pretrain.kdep import Alignment, KDEPLoss, fit_alignment, power_temperature_scaling
from sfr.pretrain.networks import TwoViewNetwork, encoder_of, simclr_projector, simsiam_predictor, simsiam_projector
from sfr.pretrain.pooled import PooledFeatures

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

"""Pre-training without labels: the sibling methods of self-feature regularization."""

from sfr.pretrain.dogo import DoGoLoss, nt_xent, similarity_kl, simsiam
from sfr.pretrain.networks import TwoViewNetwork, encoder_of, simclr_projector, simsiam_predictor, simsiam_projector

__all__ = [
    "DoGoLoss",
    "TwoViewNetwork",
    "encoder_of",
    "nt_xent",
    "simclr_projector",
    "similarity_kl",
    "simsiam",
    "simsiam_predictor",
    "simsiam_projector",
]

"""Sibling methods that pre-train a network without labels."""

from sfr.pretrain.kdep import Alignment, KDEPLoss, fit_alignment, power_temperature_scaling
from sfr.pretrain.pooled import PooledFeatures

__all__ = ["Alignment", "KDEPLoss", "PooledFeatures", "fit_alignment", "power_temperature_scaling"]

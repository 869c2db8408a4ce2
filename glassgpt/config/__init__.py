"""Every knob, as frozen dataclasses. Imports in milliseconds: nothing in this folder may import torch."""

from glassgpt.config.errors import UserError, nearest
from glassgpt.config.model import PRESET_NOTES, PRESETS, ModelConfig, preset
from glassgpt.config.pretrain import DataConfig, OptimConfig, ParallelConfig, Pretrain

__all__ = [
    "PRESETS",
    "PRESET_NOTES",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Pretrain",
    "UserError",
    "nearest",
    "preset",
]

"""Pretraining: one loop, exact data order, resumable."""

from xverse.train.loop import TrainConfig, fit
from xverse.train.pretrain import PretrainRecipe, pretrain

__all__ = ["PretrainRecipe", "TrainConfig", "fit", "pretrain"]

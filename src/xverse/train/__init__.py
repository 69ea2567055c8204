"""Pretraining: one loop, exact data order, resumable."""

from xverse.train.loop import Hooks, fit
from xverse.train.pretrain import PretrainRecipe, pretrain
from xverse.train.settings import TrainConfig

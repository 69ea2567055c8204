"""``xverse pretrain RECIPE``: from prepared shards to a model directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xverse.config import UserError
from xverse.data.feed import PretrainFeed
from xverse.data.mixture import MixtureConfig
from xverse.data.watch import ShardWatch
from xverse.files import write_text
from xverse.formats import ModelDirectory, save_hf
from xverse.formats.write import describe_model
from xverse.model import XverseConfig, XverseForCausalLM, named_shape
from xverse.model.config import FAMILY_FIELDS, SIZES
from xverse.place import Place
from xverse.tokenizer import Tokenizer
from xverse.train.float8 import check_float8
from xverse.train.loop import Hooks, TrainConfig, fit
from xverse.train.materialise import Weights, initial_weights, stored_model
from xverse.train.memory import announce
from xverse.train.parallel import Replica, World, whole, world_of
from xverse.train.plot import plot_loss
from xverse.train.report import write_report
from xverse.train.settings import layout_of
from xverse.train.validate import bits_per_byte

# Scores a model on benchmarks; calls its third argument whenever it has advanced.
Evaluate = Callable[[XverseForCausalLM, Tokenizer, Callable[[], None]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Benchmarks scored whenever the run validates: ``limit`` questions of each subject, with ``shots``
    examples."""

    tasks: list[str]
    data_dir: Path
    limit: int = 10
    shots: int = 5

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit must be positive, not {self.limit}")
        if not 0 <= self.shots <= 5:
            raise ValueError(f"shots must be 0 to 5, not {self.shots}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The cluster that the recipe is for; only ``--dry-run`` reads it. ``device``: as for ``xverse plan``."""

    device: str
    gpus: int

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus must be positive, not {self.gpus}")


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """What to train on which data. ``shape`` is a name, or the keys of ``XverseConfig``.
    ``initializer_range`` replaces the shape's: narrow models start better from larger weights. ``data`` is a
    folder made by ``xverse data prepare``; ``out`` is the run's folder for ``metrics.jsonl``,
    ``checkpoints/``, ``loss.png``, ``report.md`` and the finished model in ``model/``. ``valid_tokens``
    bounds the held-out text scored for each source (0: all). ``model``, a directory or a hub id, of XVERSE or
    a relative, is the starting point of continued pretraining; ``shape`` is then its own. ``resume_from`` is
    another run or one of its checkpoints, whose optimizer and order of data a new run continues, with other
    ``train.steps`` or decay if its learning rates so far stay the same. ``cluster`` is what ``--dry-run``
    checks the recipe for. ``data``, ``out`` and ``model`` may be URLs."""

    URLS = ("model", "data", "out")

    data: Path | str
    out: Path | str
    train: TrainConfig
    sequence_length: int
    shape: str | XverseConfig | None = None
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    initializer_range: float | None = None
    seed: int = 0
    valid_tokens: int = 16384
    evaluation: EvaluationConfig | None = None
    model: str | None = None
    resume_from: Path | None = None
    cluster: ClusterConfig | None = None

    def __post_init__(self) -> None:
        if self.shape is None and self.model is None:
            raise ValueError("shape or model is required")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {self.sequence_length}")
        if self.valid_tokens < 0:
            raise ValueError(f"valid_tokens must not be negative, not {self.valid_tokens}")
        if self.initializer_range is not None and not 0 < self.initializer_range < math.inf:
            raise ValueError(f"initializer_range must be positive, not {self.initializer_range}")


def pretrain(recipe: PretrainRecipe, evaluate: Evaluate | None = None) -> Path:
    """Run the recipe, resuming from ``out`` if it was killed; returns the finished model's directory.
    ``evaluate`` scores the model on benchmarks whenever the run validates.

    Raises UserError for a shape that does not fit the data's tokenizer, and for the ``out`` of another run.
    """
    with world_of(recipe.train.parallel) as world:
        return _pretrain(recipe, evaluate, world)


def checked_shape(recipe: PretrainRecipe) -> tuple[XverseConfig, str]:
    """The recipe's shape and its name. Raises UserError for a sequence longer than its positions."""
    if recipe.shape is None:
        assert recipe.model is not None
        config, name = ModelDirectory.named(recipe.model).config, f"of {recipe.model}"
    else:
        config = named_shape(recipe.shape) if isinstance(recipe.shape, str) else recipe.shape
        name = recipe.shape if isinstance(recipe.shape, str) else "of the recipe"
    if config.model_type == "xverse" and (own := sorted(config.given().keys() & FAMILY_FIELDS)):
        raise UserError(f"shape {name}: XVERSE has no {', '.join(own)}; start from a model of such a family")
    if recipe.initializer_range is not None:
        config = dataclasses.replace(config, initializer_range=recipe.initializer_range)
    if recipe.sequence_length > config.context_length:
        raise UserError(
            f"sequence_length {recipe.sequence_length} exceeds the {config.context_length} "
            f"positions of shape {name}"
        )
    return config, name


def checked_feed(recipe: PretrainRecipe, config: XverseConfig) -> PretrainFeed:
    """The recipe's data. Raises UserError if the tokenizer's vocabulary differs from the shape's."""
    sequences = recipe.train.sequences(recipe.train.steps)
    feed = PretrainFeed(
        recipe.data, recipe.mixture, recipe.sequence_length, recipe.seed, sequences, recipe.train.sequences
    )
    padded = recipe.model is not None and feed.tokenizer.vocab_size < config.vocab_size
    if feed.tokenizer.vocab_size != config.vocab_size and not padded:
        name = recipe.shape if isinstance(recipe.shape, str) else "of the recipe"
        raise UserError(
            f"shape {name} has a vocabulary of {config.vocab_size}, the tokenizer of {recipe.data} "
            f"one of {feed.tokenizer.vocab_size}; prepare the data with vocab_size: {config.vocab_size}"
        )
    return feed


def _pretrain(recipe: PretrainRecipe, evaluate: Evaluate | None, world: World) -> Path:
    config, name = checked_shape(recipe)
    layout_of(recipe.train, world.size, config, recipe.sequence_length)
    check_float8(recipe.train, config, world.device, recipe.sequence_length)
    feed = checked_feed(recipe, config)
    announce(world, config, recipe.train, recipe.sequence_length)
    model, weights = _initial(recipe, config, feed.tokenizer)
    tokens = recipe.train.sequences(recipe.train.steps) * recipe.sequence_length
    world.say(f"shape {name}: {config.num_parameters():,} parameters, {tokens:,} tokens, {feed.mixture}")

    def validate(model: Replica) -> dict[str, float]:
        return bits_per_byte(
            model,
            feed,
            batch_size=recipe.train.micro_batch_size or recipe.train.batch_size,
            max_tokens=recipe.valid_tokens or None,
            dtype=recipe.train.dtype,
        )

    ends = ModelDirectory.named(recipe.model).generation_config if recipe.model is not None else None
    identity = {
        "model": recipe.model,
        "shape": recipe.shape if isinstance(recipe.shape, str) else config.given(),
        "tokenizer": feed.tokenizer.hash,
        "data": _digest(feed),
        "sequence_length": recipe.sequence_length,
        "seed": recipe.seed,
        "initializer_range": config.initializer_range,
        "mixture": feed.mixture.identity(),
        "documents": feed.order,
    }
    fit(
        model,
        feed.batch,
        recipe.train,
        recipe.out,
        hooks=Hooks(
            validate=validate,
            evaluate=None
            if evaluate is None
            else lambda model, progress: evaluate(model, feed.tokenizer, progress),
            data_problem=ShardWatch([*feed.train.values(), *feed.valid.values()]),
            describe=lambda folder: describe_model(folder, config, feed.tokenizer, torch.float32, ends),
        ),
        identity=identity,
        world=world,
        weights=weights,
        resume_from=recipe.resume_from,
    )
    model = whole(model, world)
    if world.rank == 0:
        _finish(recipe, model, feed.tokenizer, f"pretraining, shape {name}", world, ends)
    world.wait()
    return Place.of(recipe.out).local / "model"


def _initial(
    recipe: PretrainRecipe, config: XverseConfig, tokenizer: Tokenizer
) -> tuple[XverseForCausalLM, Weights]:
    """The initial model, without memory, and its weights. Raises UserError for a ``model`` whose shape
    differs from the recipe's or whose tokenizer differs from the data's."""
    if recipe.model is None:
        return XverseForCausalLM.empty(config), initial_weights(config, recipe.seed)
    source = ModelDirectory.named(recipe.model)
    model, weights = stored_model(source)
    for key in (*SIZES, *sorted(FAMILY_FIELDS)):
        stored, expected = getattr(model.config, key), getattr(config, key)
        if stored != expected:
            raise UserError(
                f"{recipe.model}: {key} {stored}, but the recipe's shape has {expected}; omit shape"
            )
    if source.tokenizer.hash != tokenizer.hash:
        raise UserError(
            f"{recipe.data} was prepared with another tokenizer than {recipe.model}'s; "
            f"prepare it with tokenizer: {source}"
        )
    return model, weights


def _finish(
    recipe: PretrainRecipe,
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    title: str,
    world: World,
    ends: dict[str, Any] | None,
) -> None:
    place = Place.of(recipe.out)
    out = place.local
    save_hf(model, tokenizer, out / "model", torch.float32, generation_config=ends, overwrite=True)
    # After the model whose steps it records.
    write_text(out / "recipe.json", json.dumps(dataclasses.asdict(recipe), default=str, indent=1))
    plot_loss(out, title, validation="bits per byte")
    write_report(out, title, model.config, recipe.train, recipe.sequence_length, world)
    for name in ("model", "recipe.json", "metrics.jsonl", "loss.png", "report.md"):
        if (out / name).exists():
            (place / name).send()


def _digest(feed: PretrainFeed) -> str:
    """A digest of the training shards: other text makes another run, even under the same settings."""
    digest = hashlib.sha256()
    for name, shard in feed.train.items():
        digest.update(f"{name} {shard.header.tokens_sha256}\n".encode())
    return digest.hexdigest()

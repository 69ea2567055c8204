"""``xverse finetune RECIPE``: full supervised fine-tuning, loss on the assistant's tokens only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from xverse.config import UserError
from xverse.data.feed import collate
from xverse.data.packing import pack_examples, packed_from_examples
from xverse.files import atomic_file
from xverse.finetune.examples import Dataset, DatasetConfig, ExampleFeed, load_datasets
from xverse.formats import load_tokenizer, resolve, save_hf
from xverse.model import IGNORE, XverseForCausalLM
from xverse.train.loop import Hooks, TrainConfig, fit, sum_loss
from xverse.train.materialise import stored_model
from xverse.train.memory import announce
from xverse.train.parallel import Replica, World, whole, world_of
from xverse.train.plot import plot_loss
from xverse.train.report import write_report
from xverse.train.settings import layout_of


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """Which model to train on which instructions. ``out`` holds ``metrics.jsonl``, ``checkpoints/``,
    ``loss.png`` and the finished model in ``model/``, stored as ``save_dtype`` with ``generation`` as its
    ``generation_config.json``."""

    model: str
    datasets: list[DatasetConfig]
    out: Path
    train: TrainConfig
    sequence_length: int = 1024
    valid_share: float = 0.01
    seed: int = 0
    save_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("datasets is empty; name at least one")
        if not 0 <= self.valid_share < 1:
            raise ValueError(f"valid_share {self.valid_share} is not between 0 and 1")


def finetune(recipe: FinetuneRecipe) -> Path:
    """Run the recipe, or what is left of it after a kill; returns the finished model's directory."""
    with world_of(recipe.train.parallel) as world:
        return _finetune(recipe, world)


def _finetune(recipe: FinetuneRecipe, world: World) -> Path:
    source = resolve(recipe.model)
    model, weights = stored_model(source)
    announce(world, model.config, recipe.train, recipe.sequence_length)
    tokenizer = load_tokenizer(source)
    if recipe.sequence_length > model.config.context_length:
        raise UserError(
            f"sequence_length {recipe.sequence_length} is beyond the {model.config.context_length} "
            f"positions of {recipe.model}"
        )
    layout_of(recipe.train, world.size, model.config, recipe.sequence_length)
    datasets = load_datasets(
        recipe.datasets,
        tokenizer,
        length=recipe.sequence_length,
        valid_share=recipe.valid_share,
        seed=recipe.seed,
    )
    feed = ExampleFeed(datasets, recipe.sequence_length, tokenizer.pad_id, recipe.seed)
    rows = recipe.train.sequences(recipe.train.steps)
    epochs = rows * recipe.sequence_length / feed.tokens_per_epoch
    world.say(f"{feed.tokens_per_epoch:,} tokens an epoch; {rows:,} rows are about {epochs:.2f} epochs")

    def validate(model: Replica) -> dict[str, float]:
        return held_out_losses(model, datasets, recipe)

    identity = {
        "model": recipe.model,
        "examples": _digest(feed),
        "sequence_length": recipe.sequence_length,
        "seed": recipe.seed,
    }
    fit(
        model,
        feed.batch,
        recipe.train,
        recipe.out,
        hooks=Hooks(validate=validate),
        identity=identity,
        world=world,
        weights=weights,
    )
    target = recipe.out / "model"
    model = whole(model, world)
    if world.rank == 0:
        title = f"fine-tuning {recipe.model}"
        plot_loss(recipe.out, title)
        write_report(recipe.out, title, model.config, recipe.train, recipe.sequence_length, world)
        with atomic_file(recipe.out / "recipe.json") as path:
            path.write_text(json.dumps(dataclasses.asdict(recipe), default=str, indent=1), encoding="utf-8")
        dtype = getattr(torch, recipe.save_dtype)
        save_hf(model, tokenizer, target, dtype, generation_config=recipe.generation, overwrite=True)
    world.wait()
    return target


@torch.no_grad()
def held_out_losses(
    model: XverseForCausalLM | Replica, datasets: list[Dataset], recipe: FinetuneRecipe
) -> dict[str, float]:
    """Loss in nats per assistant token on the held-out examples, over all and by dataset."""
    sums: dict[str, tuple[float, int]] = {}
    for dataset in datasets:
        rows = pack_examples([len(ids) for ids, _ in dataset.valid], recipe.sequence_length)
        nats, count = 0.0, 0
        for start in range(0, len(rows), recipe.train.batch_size):
            batch = collate(
                [
                    packed_from_examples([dataset.valid[i] for i in row], recipe.sequence_length, 0)
                    for row in rows[start : start + recipe.train.batch_size]
                ]
            )
            nats += sum_loss(
                model, batch.tokens, batch.targets, batch.document_ids, recipe.train.dtype
            ).item()
            count += int((batch.targets != IGNORE).sum())
        if count:
            sums[dataset.name] = (nats, count)
    if not sums:
        return {}
    total = sum(nats for nats, _ in sums.values()) / sum(count for _, count in sums.values())
    return {"all": total, **{name: nats / count for name, (nats, count) in sums.items()}}


def _digest(feed: ExampleFeed) -> str:
    digest = hashlib.sha256()
    for ids, mask in feed.examples:
        digest.update(str((ids, mask)).encode())
    return digest.hexdigest()

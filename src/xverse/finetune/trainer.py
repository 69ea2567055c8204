"""transformers' Trainer over examples without padding: sampler, batches, exact evaluation, checks.

The examples of a micro-batch are concatenated into a single row, with positions from 0 in each. Attention is
computed per example, so the loss equals that of padded rows, without computing anything for padding.
``num_items_in_batch`` counts the tokens with loss of a whole step over all processes, so neither gradient
accumulation nor the number of processes changes the loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from xverse.config import UserError, choose
from xverse.data.order import random_order
from xverse.data.packing import pack_examples
from xverse.files import write_json
from xverse.finetune.encode import Example
from xverse.finetune.safety import Saver
from xverse.finetune.stream import Stream
from xverse.log import JsonlLog, notice
from xverse.model import IGNORE
from xverse.tokenizer import Tokenizer
from xverse.train.copies import Copies
from xverse.train.parallel import ALONE, World

FILLER = -1  # a row without examples and loss, which completes the last step of an epoch
Batch = dict[str, Any]
_UNRECORDED = ("epoch", "num_input_tokens_seen")  # of what Trainer logs


class Rows(Dataset[list[Example]]):
    """Rows of examples, as indices: ``group`` neighbours, or as many as fit into ``length`` tokens."""

    def __init__(
        self,
        examples: Sequence[Example],
        length: int | None,
        seed: int,
        group: int = 1,
        shuffled: bool = True,
    ) -> None:
        self.examples, self.length, self.seed, self.shuffled = examples, length, seed, shuffled
        self.rows = [list(range(start, start + group)) for start in range(0, len(examples), group)]
        if length is not None:
            order = list(range(len(examples)))
            if shuffled:
                order = random_order(len(examples), "rows", seed).tolist()
            packed = pack_examples([len(examples[i].ids) for i in order], length)
            self.rows = [[order[i] for i in row] for row in packed]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> list[Example]:
        return [] if number == FILLER else [self.examples[i] for i in self.rows[number]]

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sum(len(self.examples[i].ids) for i in row) for row in self.rows]


class Order(Sampler[int]):
    """All rows in an order that depends on (seed, epoch) alone, filled up to a multiple of ``multiple`` rows.
    With ``lengths``, 50 steps' rows at a time are sorted by length, so rows of a step are similar; without
    ``shuffled``, the rows keep their order."""

    def __init__(
        self,
        count: int,
        multiple: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        shuffled: bool = True,
    ) -> None:
        self.count, self.multiple, self.seed, self.epoch = count, multiple, seed, 0
        self.lengths, self.shuffled = lengths, shuffled
        self.total = math.ceil(count / multiple) * multiple

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        if self.shuffled:
            order = random_order(self.count, "examples", self.seed, self.epoch).tolist()
        order += [FILLER] * (self.total - self.count)
        if self.lengths is not None:
            order = self._grouped(order, self.lengths)
        yield from order

    def _grouped(self, order: list[int], lengths: Sequence[int]) -> list[int]:
        steps: list[list[int]] = []
        for start in range(0, len(order), 50 * self.multiple):
            near = sorted(
                order[start : start + 50 * self.multiple],
                key=lambda row: -1 if row == FILLER else lengths[row],
                reverse=True,
            )
            steps += [near[at : at + self.multiple] for at in range(0, len(near), self.multiple)]
        mixed = random_order(len(steps), "steps", self.seed, self.epoch).tolist()
        return [row for step in mixed for row in steps[step]]


def widest(rows: Rows, batch: int, processes: int, seed: int, grouped: bool) -> tuple[int, int]:
    """Tokens in the largest micro-batch of the first epoch, and how many of them have loss."""
    lengths = rows.lengths() if grouped else None
    order = list(Order(len(rows), batch * processes, seed, lengths, rows.shuffled))
    sizes = []
    for start in range(0, len(order), batch):
        examples = [example for row in order[start : start + batch] for example in rows[row]]
        sizes.append((sum(len(e.ids) for e in examples), sum(sum(e.mask) for e in examples)))
    return max(sizes)


def row_of(examples: Sequence[Example], pad_id: int) -> Batch:
    """All ``examples`` in one row: input_ids, labels and position_ids int64 [1, T], and what would be read
    back from a GPU otherwise: ``cu_seq_lens_q`` int32 [n + 1] and ``max_length_q``, ``num_targets``, and
    ``names``, those of the first eight examples; in stage kto ``desirable``, bool [n], and of pairs with
    margins ``margins``, float32 [n/2].

    Labels are not shifted; the first token of an example has none.
    """
    lengths = [len(example.ids) for example in examples] or [2]
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += example.ids
        labels += [
            token if kept and place else IGNORE
            for place, (token, kept) in enumerate(zip(example.ids, example.mask, strict=True))
        ]
        positions += range(len(example.ids))
    if not ids:
        ids, labels, positions = [pad_id] * 2, [IGNORE] * 2, [0, 1]
    row = {"input_ids": ids, "labels": labels, "position_ids": positions}
    tagged = bool(examples) and examples[0].desirable is not None
    margins = [example.margin for example in examples[::2]]
    return {
        **({"margins": torch.tensor(margins)} if any(margins) else {}),
        **({"desirable": torch.tensor([bool(example.desirable) for example in examples])} if tagged else {}),
        **{key: torch.tensor([value]) for key, value in row.items()},
        "cu_seq_lens_q": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "max_length_q": max(lengths),
        "num_targets": sum(label != IGNORE for label in labels),
        "names": ", ".join(example.name for example in examples[:8]),
    }


def order_seed(args: Any) -> int:
    """The seed of the order of examples."""
    return int(args.seed if args.data_seed is None else args.data_seed)


class SavedTokenizer:
    """A tokenizer as Trainer saves it, beside the model and each of its checkpoints."""

    def __init__(self, tokenizer: Tokenizer, padding_side: str | None) -> None:
        self.tokenizer, self.padding_side = tokenizer, padding_side

    def save_pretrained(self, directory: str) -> None:
        self.tokenizer.save(directory)
        file = Path(directory) / "tokenizer_config.json"
        if self.padding_side and file.is_file():
            values = {**json.loads(file.read_text(encoding="utf-8")), "padding_side": self.padding_side}
            write_json(file, values)


def inputs_of(batch: Batch) -> Batch:
    """What a model takes of a row of ``row_of``."""
    names = "input_ids position_ids cu_seq_lens_q max_length_q cu_seq_lens_k max_length_k key_places"
    return {**{name: batch[name] for name in names.split() if name in batch}, "use_cache": False}


class FinetuneTrainer(Trainer):
    """Trains on ``examples``, or on ``stream`` instead, and evaluates on ``held_out``. ``row_length`` packs
    rows of at most so many tokens; ``grouped`` makes the rows of a step similar in length. ``optimizer``
    makes another optimizer than that of the arguments."""

    group = 1  # neighbouring examples that stay in one row

    def __init__(
        self,
        *,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        row_length: int | None,
        pad_id: int,
        grouped: bool = False,
        stream: Stream | None = None,
        shuffled: bool = True,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        **options: Any,
    ) -> None:
        self.pad_id, self.grouped, self._make_optimizer = pad_id, grouped, optimizer
        seed = order_seed(options["args"])
        super().__init__(
            train_dataset=stream or Rows(examples, row_length, seed, self.group, shuffled),
            eval_dataset=Rows(held_out, row_length, seed, self.group) if held_out else None,
            data_collator=self._collate,
            **options,
        )
        self.world = ALONE
        self._order_seed = seed
        self._unchecked: list[tuple[Tensor, str]] = []  # losses of this step and the examples' names

    def _collate(self, rows: list[list[Example]]) -> Batch:
        return row_of([example for row in rows for example in row], self.pad_id)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        multiple = self.args.per_device_train_batch_size * self.args.world_size
        if isinstance(self.train_dataset, Stream):
            return SequentialSampler(self.train_dataset)
        assert isinstance(self.train_dataset, Rows)
        lengths = self.train_dataset.lengths() if self.grouped else None
        rows = self.train_dataset
        return Order(len(rows), multiple, self._order_seed, lengths, rows.shuffled)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self._make_optimizer is not None and self.optimizer is None:
            self.optimizer = self._make_optimizer(model or self.model)
        return super().create_optimizer(model)

    def keep(self, world: World, write_base: Callable[[Path], None], copies: Copies) -> None:
        """Set what checkpoints need: the processes, what records the base of an adapter, and their copies at
        a URL, of which that of the best checkpoint stays."""
        best = dataclasses.replace(copies.kept, forever=lambda step: step == self.state.best_global_step)
        self.saver, self.world = Saver(dataclasses.replace(copies, kept=best), world), world
        self._write_base = write_base

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        last = self.control.should_training_stop or step >= self.state.max_steps
        self.saver.save(step, lambda path: self._write_checkpoint(path, model, trial), last)

    def _write_checkpoint(self, path: Path, model: Any, trial: Any) -> None:
        # A sharded model writes its files later than Trainer looks for the folder of the best checkpoint.
        path.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)
        if not self.is_world_process_zero():
            return
        plain = self.accelerator.unwrap_model(self.model)
        if getattr(plain, "peft_config", None):
            self._write_base(path)
        elif not (path / "config.json").exists():  # Trainer omits them from sharded checkpoints
            plain.config.save_pretrained(path)
            plain.generation_config.save_pretrained(path)
            tokenizer: Any = self.processing_class
            tokenizer.save_pretrained(path)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer compares the step with the last only after it has taken one more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Raises UserError, naming the examples, if a loss of the step is not finite."""
        names = inputs.pop("names")
        result = self.batch_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self._unchecked.append((loss.detach(), names))
        if self.accelerator.sync_gradients:  # once a step: reading a value waits for the device
            self._check_losses(kwargs.get("num_items_in_batch"))
        return result

    def _check_losses(self, targets: Tensor | int | None) -> None:
        unchecked, self._unchecked = self._unchecked, []
        values = [loss.float() for loss, _ in unchecked]
        if targets is not None:
            values.append(torch.as_tensor(targets, dtype=torch.float32, device=values[0].device).sum())
        losses = torch.stack(values).tolist()
        step = f"step {self.state.global_step + 1}"
        if targets is not None and losses.pop() == 0:
            raise UserError(f"{step}: no token with loss in the whole step ({unchecked[-1][1]})")
        for loss, (_, names) in zip(losses, unchecked, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"{step}: the loss is {loss} on {names}; lower learning_rate or max_grad_norm, or check "
                    "these examples"
                )

    def batch_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "skip_logits": True}, *args, **kwargs)

    def held_out_sums(self, model: Any, batch: Batch) -> list[float]:
        """Loss and count of one batch, then other sums over the held-out examples; four numbers at most."""
        output = model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1)
        return [output.loss.item(), float(batch["num_targets"])]

    def held_out_metrics(self, sums: list[float]) -> dict[str, float]:
        loss = sums[0] / max(1.0, sums[1])
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    def check_metric(self) -> None:
        """Raise UserError if the best checkpoint is to be found by a figure that evaluation lacks."""
        name = self.args.metric_for_best_model
        if name is None or not isinstance(self.eval_dataset, Rows):
            return
        names = sorted({example.dataset for example in self.eval_dataset.examples})
        known = [*self.held_out_metrics([0.0] * 4), *(f"loss/{name}" for name in names if len(names) > 1)]
        choose("metric_for_best_model", name.removeprefix("eval_"), dict.fromkeys(known))

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss in nats per token with loss over all held-out examples, and for each of several datasets.

        Each example counts once, whatever the number of processes.
        """
        started = time.perf_counter()
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(rows, Rows)
        datasets, sums = self._sums_by_dataset(rows)
        figures = {**self.held_out_metrics(sums.sum(0).tolist())}
        if len(datasets) > 1:
            for name, values in zip(datasets, sums.tolist(), strict=True):
                figures[f"loss/{name}"] = self.held_out_metrics(values)["loss"]
        figures["runtime"] = round(time.perf_counter() - started, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def held_out_nats(self, examples: Sequence[Example]) -> dict[str, float]:
        """The summed loss of ``examples`` in nats, by dataset."""
        datasets, sums = self._sums_by_dataset(Rows(examples, None, self._order_seed))
        return dict(zip(datasets, sums[:, 0].tolist(), strict=True))

    def _sums_by_dataset(self, rows: Rows) -> tuple[list[str], Tensor]:
        """The datasets' names, and ``held_out_sums`` of each over all processes, float32 [datasets, 4]."""
        datasets = sorted({example.dataset for example in rows.examples})
        batches = list(self._batches_by_dataset(rows, datasets))
        world, rank = self.args.world_size, self.args.process_index
        # Sharded models gather weights in every forward pass, so all processes must run equally many.
        batches += [(0, [])] * (-len(batches) % world)
        model: Any = self.model_wrapped if self.is_in_train else self.model
        if not self.is_in_train:
            model = model.to(self.args.device)
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(datasets), 4, dtype=torch.float64)
        for number, part in batches[rank::world]:
            batch = self._collate(part)
            del batch["names"]
            batch = self._prepare_inputs(batch)
            values = self.held_out_sums(model, batch)
            sums[number, : len(values)] += torch.tensor(values, dtype=torch.float64)
        model.train(was_training)
        return datasets, self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").cpu()

    def _batches_by_dataset(
        self, rows: Rows, datasets: list[str]
    ) -> Iterator[tuple[int, list[list[Example]]]]:
        """Batches of rows, each of one dataset, with that dataset's number."""
        size = self.args.per_device_eval_batch_size
        for number, name in enumerate(datasets):
            own = [example for example in rows.examples if example.dataset == name]
            part = Rows(own, rows.length, rows.seed, self.group)
            for start in range(0, len(part), size):
                yield number, [part[row] for row in range(start, min(start + size, len(part)))]


class MetricsCallback(TrainerCallback):
    """Writes what Trainer logs to ``metrics.jsonl``, as ``plot_loss`` reads it, and to the console."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log: JsonlLog | None = None
        self.started, self.first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        record: dict[str, Any] = {"step": state.global_step - 1}  # -1: before the first
        if "loss" in logs:
            record |= {key: value for key, value in logs.items() if key not in _UNRECORDED}
            pace = (time.perf_counter() - self.started) / max(1, state.global_step - self.first)
            left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
            notice(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                + (f"reward {logs['reward']:.4f}  " if "reward" in logs else "")
                + f"learning rate {logs.get('learning_rate', 0):.2e}  {pace:.2f} s/step  {left} left"
            )
        elif "eval_loss" in logs:
            parts = {
                key.removeprefix("eval_loss/"): logs[key] for key in logs if key.startswith("eval_loss/")
            }
            record["valid"] = {"all": logs["eval_loss"], **parts}
            names = ("loss", "perplexity", "margin", "accuracy", "reward", "completion_length")
            shown = [f"{name} {logs[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in logs]
            notice(f"held out at step {state.global_step}: {', '.join(shown)}")
        else:
            return
        self.log = self.log or JsonlLog(self.path)
        self.log.write(record)

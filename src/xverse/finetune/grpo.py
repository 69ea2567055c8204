"""Group relative policy optimisation (Shao et al., 2024, arXiv:2402.03300) and the variants of its loss that
trl's GRPOConfig names: DAPO (arXiv:2503.14476), Dr. GRPO (arXiv:2503.20783), GSPO (arXiv:2507.18071) and
CISPO (arXiv:2506.13585).

Each optimizer step generates a group of replies to each of its prompts (``rollouts.py``), rewards them
(``rewards.py``) and trains on them and their prompt once, without padding. Replies and their order depend on
the seed, the step and the prompt; sums over tokens are divided by figures of the whole step, so neither
accumulation nor the number of processes changes the loss. Every process generates whole groups.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler

from xverse.config import UserError
from xverse.data.order import random_order
from xverse.files import write_text
from xverse.finetune.encode import Example, Prompt
from xverse.finetune.preferences import reference_model
from xverse.finetune.rewards import Completion, Rewards
from xverse.finetune.rollouts import Generator, seed_of
from xverse.finetune.settings import Settings
from xverse.finetune.trainer import FILLER, Batch, FinetuneTrainer, Rows, inputs_of, order_seed

ROLLOUTS = "rollouts-{}.json"  # of each process, in checkpoints between two steps on the same replies
_SUMS = ("tokens", "clipped", "kl", "difference", "ratio")


@dataclass
class Rollout:
    """A reply with its prompt as an example, the log-probabilities of its tokens when they were drawn, its
    advantage and the weight of its tokens in the loss; ``old``: their log-probabilities before the first
    step on it. A missing prompt at the end of an epoch has an empty example."""

    example: Example
    logprobs: list[float] = dataclasses.field(default_factory=list)
    advantage: float = 0.0
    weight: float = 0.0
    old: list[float] | None = None

    @property
    def counted(self) -> int:
        return sum(self.example.mask)


class Groups(Sampler[int]):
    """Prompts by index, in an order that depends on (seed, epoch) alone: each occurs once for each of its
    replies, so that a process's micro-batches of a step hold whole groups. Steps are repeated ``iterations``
    times, the last one is completed by fillers."""

    def __init__(
        self, count: int, *, batch: int, accumulation: int, processes: int, generations: int,
        iterations: int, seed: int, shuffled: bool,
    ) -> None:  # fmt: skip
        self.count, self.batch, self.accumulation, self.processes = count, batch, accumulation, processes
        self.generations, self.iterations, self.seed, self.shuffled = generations, iterations, seed, shuffled
        self.prompts = batch * accumulation // generations  # of a process in a step
        self.steps, self.epoch = math.ceil(count / (self.prompts * processes)), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.iterations * self.batch * self.accumulation * self.processes

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        if self.shuffled:
            order = random_order(self.count, "examples", self.seed, self.epoch).tolist()
        a_step = self.prompts * self.processes
        order += [FILLER] * (self.steps * a_step - self.count)
        for start in range(0, len(order), a_step):
            for _ in range(self.iterations):
                for micro in range(self.accumulation):
                    for process in range(self.processes):
                        for row in range(self.batch):
                            place = (micro * self.batch + row) // self.generations
                            yield order[start + process * self.prompts + place]


def advantages(rewards: Tensor, scale: str) -> Tensor:
    """``rewards`` float64 [groups, generations] → advantages of the same shape. ``scale`` "group" or "batch"
    divides them by the deviation of their group or of all rewards, as trl does."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    deviation = rewards.std(1, keepdim=True) if scale == "group" else rewards.std()
    return centred / (deviation + 1e-4)


def correction(difference: Tensor, example: Tensor, settings: Settings) -> Tensor:
    """Importance weights [K] from ``difference`` [K], the log-probabilities of training less those of
    generation; ``example`` int64 [K]."""
    mode = settings.importance_sampling_mode or ""
    if mode.startswith("sequence"):
        sums = difference.new_zeros(int(example.max()) + 1).index_add(0, example, difference)
        difference = sums[example]
    ratio = difference.exp()
    low, high = settings.importance_sampling_clip_min, settings.importance_sampling_clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def policy_losses(
    logprobs: Tensor, old: Tensor, advantage: Tensor, example: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The loss of each token [K], and whether its ratio is clipped. All arguments [K]; ``example`` int64."""
    log_ratio = logprobs - old
    if settings.importance_sampling_level == "sequence":
        zeros = log_ratio.new_zeros(int(example.max()) + 1)
        counts = zeros.index_add(0, example, torch.ones_like(log_ratio))
        log_ratio = (zeros.index_add(0, example, log_ratio) / counts.clamp(min=1))[example]
    ratio = log_ratio.exp()
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if settings.loss_type == "cispo":
        clipped = (ratio > high) & (advantage > 0)
        return -ratio.clamp(max=high).detach() * advantage * logprobs, clipped
    bounded = ratio.clamp(1 - settings.epsilon, 1 + high)
    clipped = ((ratio < 1 - settings.epsilon) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
    if settings.delta is not None:
        ratio = ratio.clamp(max=settings.delta)
    return -torch.minimum(ratio * advantage, bounded * advantage), clipped


def row_of(rollouts: Sequence[Rollout], pad_id: int) -> Batch:
    """``rollouts`` with loss in one row, the prompt of neighbours once (see ``Continued``), no last tokens,
    which predict nothing. Besides what a model takes (``inputs_of``), int64 [K] each: ``kept``, the places
    whose logits predict the tokens with loss, these ``targets``, and the ``reply`` of each."""
    sequences: list[tuple[list[int], range]] = []  # tokens, and the place of what they continue
    kept: list[int] = []
    targets: list[int] = []
    reply: list[int] = []
    at, before, prompt = 0, range(0), [-1]
    for number, rollout in enumerate(rollout for rollout in rollouts if rollout.counted):
        count, ids = rollout.counted, rollout.example.ids
        if ids[:-count] != prompt:
            prompt = ids[:-count]
            sequences.append((prompt, range(0)))
            before = range(at, at := at + len(prompt))
        kept += [before[-1], *range(at, at := at + count - 1)]
        targets += ids[-count:]
        reply += [number] * count
        if count > 1:
            sequences.append((ids[-count:-1], before))
    sequences = sequences or [([pad_id] * 2, range(0))]
    ends = [0, *itertools.accumulate(len(ids) for ids, _ in sequences)]
    seen = [len(before) + len(ids) for ids, before in sequences]
    lists = {
        "input_ids": [[token for ids, _ in sequences for token in ids]],
        "position_ids": [[len(before) + i for ids, before in sequences for i in range(len(ids))]],
        "key_places": [
            place
            for start, (ids, before) in zip(ends[:-1], sequences, strict=True)
            for place in (*before, *range(start, start + len(ids)))
        ],
        "kept": kept,
        "targets": targets,
        "reply": reply,
    }
    return {
        **{name: torch.tensor(values, dtype=torch.long) for name, values in lists.items()},
        "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *itertools.accumulate(seen)], dtype=torch.int32),
        "max_length_q": max(len(ids) for ids, _ in sequences),
        "max_length_k": max(seen),
        "names": ", ".join([rollout.example.name for rollout in rollouts][:8]),
    }


class GrpoTrainer(FinetuneTrainer):
    """``examples`` and ``held_out`` are prompts. ``reference`` is a frozen model; None means the trained one
    without its adapter, if ``beta`` needs one."""

    def __init__(
        self, *, settings: Settings, generator: Generator, rewards: Rewards, reference: Any, **options: Any
    ) -> None:
        super().__init__(**options)
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise UserError("stage grpo cannot be combined with ZeRO-3; use another stage or fsdp")
        self.model_accepts_loss_kwargs = False  # the loss is not a mean over the row's tokens
        self.settings, self.generator, self.rewards = settings, generator, rewards
        self.reference = reference
        if reference is not None:
            self.reference = reference.eval().requires_grad_(False).to(self.args.device)
        self._rollouts: list[Rollout] | None = None  # of this step, in the order of its micro-batches
        self._resumed: Path | None = None
        self._sums = dict.fromkeys(_SUMS, 0.0)  # over this process's tokens since the last log
        self._largest = 0.0
        self._steps: list[dict[str, float]] = []  # figures of generations since the last log
        self._last: dict[str, float] = {}  # their means at the last log
        self._generated, self._seconds = 0, 0.0

    # The order of prompts, and replies to them

    def _collate(self, rows: list[list[Example]]) -> Batch:
        return {"prompts": [row[0] if row else None for row in rows]}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset
        assert isinstance(rows, Rows)
        return Groups(
            len(rows),
            batch=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            processes=self.args.world_size,
            generations=self.settings.num_generations,
            iterations=self.settings.num_iterations,
            seed=order_seed(self.args),
            shuffled=rows.shuffled,
        )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        batches = [batch["prompts"] for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        prompts = [prompt for batch in batches for prompt in batch]
        if self.state.global_step % self.settings.num_iterations == 0:
            self._rollouts = self._generate(prompts)
        elif self._rollouts is None:
            self._rollouts = self._saved(len(prompts))
        size = self.args.per_device_train_batch_size
        rollouts = self._rollouts
        return [self._row(rollouts[at : at + size]) for at in range(0, len(rollouts), size)], None

    def _row(self, rollouts: list[Rollout]) -> Batch:
        return {**row_of(rollouts, self.pad_id), "rollouts": rollouts}

    def _generate(self, prompts: Sequence[Prompt | None]) -> list[Rollout]:
        """The rewarded replies to ``prompts``, each repeated for every reply; None: a filler."""
        size = self.settings.num_generations
        real = [prompt for prompt in prompts if prompt is not None]
        round_number = self.state.global_step // self.settings.num_iterations
        seeds = [
            seed_of(self.args.seed, "grpo", round_number, prompt.name, number, place % size)
            for place, (prompt, number) in enumerate(_numbered(real, size))
        ]
        started = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model_wrapped)
        completions = self.generator(model, [prompt.ids for prompt in real], seeds)
        self._seconds += time.perf_counter() - started
        self._generated += sum(len(completion.ids) for completion in completions)
        rows = self.rewards(real, completions)
        totals = [self.rewards.total(row) for row in rows]
        everywhere = self.world.gathered((totals, [(len(c.ids), c.finished) for c in completions], rows))
        all_totals = torch.tensor([x for part in everywhere for x in part[0]], dtype=torch.float64)
        lengths = [x for part in everywhere for x in part[1]]
        groups = all_totals.view(-1, size)
        scaled = advantages(groups, self.settings.scale_rewards).flatten().tolist()
        before = sum(len(part[0]) for part in everywhere[: self.args.process_index])
        own = scaled[before : before + len(totals)]
        self._note(groups, [x for part in everywhere for x in part[2]], lengths)
        masked = self.settings.mask_truncated_completions
        kept = [count if finished or not masked else 0 for count, finished in lengths]
        made = iter(
            self._rollout(prompt, completion, advantage, sum(kept), len(kept))
            for prompt, completion, advantage in zip(real, completions, own, strict=True)
        )
        return [Rollout(Example([], [], "")) if prompt is None else next(made) for prompt in prompts]

    def _rollout(
        self, prompt: Prompt, completion: Completion, advantage: float, tokens: int, replies: int
    ) -> Rollout:
        """``tokens`` with loss and ``replies`` of the whole step."""
        count = len(completion.ids)
        learnt = completion.finished or not self.settings.mask_truncated_completions
        # Without an advantage, as in a group of equal rewards, only a reference gives a gradient.
        trained = learnt and bool(advantage or self.settings.beta)
        divisor = {
            "grpo": replies * count,
            "dr_grpo": replies * self.settings.max_completion_length,
            "bnpo": 0,  # of the micro-batch: see batch_loss
        }.get(self.settings.loss_type, tokens)
        return Rollout(
            Example(prompt.ids + completion.ids, prompt.mask + [trained] * count, prompt.name),
            completion.logprobs if learnt else [],
            advantage,
            1 / divisor if divisor else 0.0,
        )

    def _note(self, groups: Tensor, rows: list[list[float]], lengths: list[tuple[int, bool]]) -> None:
        figures = {
            "reward": groups.mean().item(),
            "reward_std": groups.std(1).mean().item(),
            "reward_equal_share": (groups.std(1) < 1e-8).double().mean().item(),
            "completion_length": sum(count for count, _ in lengths) / len(lengths),
            "truncated_share": sum(not finished for _, finished in lengths) / len(lengths),
        }
        if len(self.rewards.names) > 1:
            for name, values in zip(self.rewards.names, zip(*rows, strict=True), strict=True):
                figures[f"reward/{name}"] = sum(values) / len(values)
        self._steps.append(figures)

    # The loss

    def batch_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        rollouts = [rollout for rollout in inputs["rollouts"] if rollout.counted]
        logprobs, example = self._log_probabilities(model, inputs), inputs["reply"]
        reference = None
        if self.settings.beta:
            with torch.no_grad(), reference_model(self, model) as frozen:
                reference = self._log_probabilities(frozen, inputs)
        if not rollouts:
            return logprobs.sum()
        for rollout, values in zip(
            rollouts, logprobs.detach().split([r.counted for r in rollouts]), strict=True
        ):
            if rollout.old is None:
                rollout.old = values.tolist()
        batches = self.current_gradient_accumulation_steps * self.args.world_size
        in_row = sum(len(rollout.logprobs) for rollout in inputs["rollouts"]) * batches
        columns = [
            (r.old or [], r.logprobs, [r.advantage] * r.counted, [r.weight or 1 / in_row] * r.counted)
            for r in rollouts
        ]
        old, sampled, advantage, weight = (
            torch.tensor([*itertools.chain(*column)], dtype=torch.float32, device=logprobs.device)
            for column in zip(*columns, strict=True)
        )
        losses, clipped = policy_losses(logprobs, old, advantage, example, self.settings)
        difference = old - sampled
        if self.settings.importance_sampling_mode:
            losses = losses * correction(difference, example, self.settings)
        kl = torch.zeros_like(losses)
        if reference is not None:
            gap = reference - logprobs
            kl = gap.exp() - gap - 1  # Schulman's estimator, never negative
            losses = losses + self.settings.beta * kl
        self._count(clipped, kl.detach(), difference)
        # Trainer divides by the accumulated micro-batches, and processes average their gradients.
        return (weight * losses).sum() * batches

    def _log_probabilities(self, model: Any, row: Batch) -> Tensor:
        """The log-probability of each token with loss in a row of ``row_of``, float32 [K], of logits divided
        by the temperature."""
        logits = model(**inputs_of(row), logits_to_keep=row["kept"]).logits[0]
        scaled = logits[:, : self.generator.tokenizer.vocab_size].float()  # [K, V]
        if self.settings.temperature != 1:
            scaled = scaled / self.settings.temperature
        return -cross_entropy(scaled, row["targets"], reduction="none")

    def _count(self, clipped: Tensor, kl: Tensor, difference: Tensor) -> None:
        apart = difference.abs()
        figures = torch.stack([clipped.sum(), kl.sum(), apart.sum(), difference.exp().sum(), apart.max()])
        values = [float(len(kl)), *figures.tolist()]
        self._largest = max(self._largest, values.pop())
        for name, value in zip(_SUMS, values, strict=True):
            self._sums[name] += value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._figures()
        super().log(logs, *args, **kwargs)

    def _figures(self) -> dict[str, float]:
        """Means since the last log, over all processes."""
        if self._steps:
            self._last = {
                name: sum(step[name] for step in self._steps) / len(self._steps) for name in self._steps[0]
            }
        tokens, *sums = self.world.sum(*self._sums.values())
        generated, seconds = self.world.sum(self._generated, self._seconds)
        largest = max(self.world.gathered(self._largest))
        clipped, kl, difference, ratio = (value / max(1.0, tokens) for value in sums)
        figures = {**self._last, "clip_ratio": clipped}
        if self.settings.beta:
            figures["kl"] = kl
        if tokens:
            figures |= {
                "logprob_difference": difference,
                "logprob_difference_max": largest,
                "sampling_ratio": ratio,
            }
        if seconds:
            figures["rollout_tokens_per_second"] = generated * self.args.world_size / seconds
        self._sums, self._largest, self._steps = dict.fromkeys(_SUMS, 0.0), 0.0, []
        self._generated, self._seconds = 0, 0.0
        return figures

    # Evaluation: a reply to each held-out prompt

    def _sums_by_dataset(self, rows: Rows) -> tuple[list[str], Tensor]:
        datasets = sorted({example.dataset for example in rows.examples})
        prompts: list[Any] = list(rows.examples)[self.args.process_index :: self.args.world_size]
        model = self.accelerator.unwrap_model(self.model_wrapped if self.is_in_train else self.model)
        seeds = [seed_of(self.args.seed, "evaluation", prompt.name) for prompt in prompts]
        completions = self.generator(model, [prompt.ids for prompt in prompts], seeds)
        sums = torch.zeros(len(datasets), 4, dtype=torch.float64)
        for prompt, completion, row in zip(
            prompts, completions, self.rewards(prompts, completions), strict=True
        ):
            total = self.rewards.total(row)
            sums[datasets.index(prompt.dataset)] += torch.tensor([-total, 1.0, len(completion.ids), 0.0])
        summed = self.world.sum(*sums.flatten().tolist())
        return datasets, torch.tensor(summed, dtype=torch.float64).view_as(sums)

    def held_out_metrics(self, sums: list[float]) -> dict[str, float]:
        count = max(1.0, sums[1])
        return {"loss": sums[0] / count, "reward": -sums[0] / count, "completion_length": sums[2] / count}

    # Checkpoints between two steps on the same replies

    def _write_checkpoint(self, path: Path, model: Any, trial: Any) -> None:
        super()._write_checkpoint(path, model, trial)
        if self.state.global_step % self.settings.num_iterations and self._rollouts is not None:
            values = [dataclasses.asdict(rollout) for rollout in self._rollouts]
            write_text(path / ROLLOUTS.format(self.args.process_index), json.dumps(values))

    def _saved(self, count: int) -> list[Rollout]:
        """This process's part of the replies in the checkpoint, which another number of processes may have
        written. Raises UserError if they are not those of a step."""
        assert self._resumed is not None
        saved: list[Rollout] = []
        for rank in itertools.count():
            file = self._resumed / ROLLOUTS.format(rank)
            if not file.exists():
                break
            values = json.loads(file.read_text(encoding="utf-8"))
            saved += [Rollout(**{**item, "example": Example(**item["example"])}) for item in values]
        if len(saved) != count * self.args.world_size:
            raise UserError(
                f"{self._resumed}: holds {len(saved)} replies of a step of {count * self.args.world_size}; "
                "continue it with as many rows a step"
            )
        return saved[self.args.process_index * count :][:count]


def _numbered(prompts: Sequence[Prompt], size: int) -> Iterator[tuple[Prompt, int]]:
    """Each prompt with the number of earlier groups of the same one."""
    seen: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        if place % size == 0:
            seen[prompt.name] = seen.get(prompt.name, -1) + 1
        yield prompt, seen[prompt.name]

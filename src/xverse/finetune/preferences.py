"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290) and its variants, ORPO (Hong et
al., 2024, arXiv:2403.07691), SimPO (Meng et al., 2024, arXiv:2405.14734) and KTO (Ethayarajh et al., 2024,
arXiv:2402.01306), without padding.

trl's trainer would tokenise the rendered template, whose ids differ from XVERSE's where a role's prefix meets
the text, and compute logits for prompts. Here a pair is two examples of ``encode.py``, and only tokens with
loss have logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from xverse.finetune.settings import Settings
from xverse.finetune.trainer import Batch, FinetuneTrainer, inputs_of
from xverse.model import IGNORE


def logits_with_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Of the tokens with loss in a row of ``row_of``: the logits that predict them [K, V], the places of
    these logits in the row and the tokens themselves, int64 [K] each."""
    targets = batch["labels"][0, 1:]  # [T-1]; an example's first token has no label
    kept = torch.nonzero_static(targets != IGNORE, size=batch["num_targets"]).flatten()  # [K]
    return model(**inputs_of(batch), logits_to_keep=kept).logits[0], kept, targets[kept]


def log_probabilities(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed log-probability and the number of tokens with loss of each example in a row of ``row_of``,
    float32 [n] each."""
    logits, kept, targets = logits_with_loss(model, batch)
    tokens = -cross_entropy(logits.float(), targets, reduction="none")  # [K]
    example = (batch["position_ids"][0] == 0).cumsum(0)[kept + 1] - 1  # [K]
    zeros = tokens.new_zeros(len(batch["cu_seq_lens_q"]) - 1)
    sums = zeros.index_add(0, example, tokens)
    return sums, zeros.index_add(0, example, torch.ones_like(tokens))


@contextlib.contextmanager
def reference_model(trainer: Any, model: Any) -> Iterator[Any]:
    """``trainer.reference``; without one the trained ``model`` in evaluation mode, without its adapter."""
    if trainer.reference is not None:
        yield trainer.reference
        return
    peft_model = trainer.accelerator.unwrap_model(model)
    training = peft_model.training
    peft_model.eval()
    with peft_model.disable_adapter():
        yield peft_model
    peft_model.train(training)


class MeanOfPairs(FinetuneTrainer):
    """``examples`` alternate between the replies of a pair. The loss is the mean over the pairs of a step, on
    all processes and in all micro-batches."""

    group = 2

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs, not over tokens
        self._pairs = 0.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], None]:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = (len(batch["cu_seq_lens_q"]) - 1 for batch in batches if batch["num_targets"])
        (self._pairs,) = self.world.sum(sum(counts) / 2)
        return batches, None

    def batch_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        losses, _ = self._losses(model, inputs)
        # Trainer divides by the accumulated micro-batches, and processes average their gradients.
        scale = self.current_gradient_accumulation_steps * self.args.world_size
        return losses.sum() * (scale / max(1.0, self._pairs))

    def _losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and margin between the rewards of each pair, [n]; a zero with a gradient in a filler row."""
        raise NotImplementedError

    def held_out_sums(self, model: Any, batch: Batch) -> list[float]:
        if not batch["num_targets"]:
            self._losses(model, batch)
            return [0.0, 0.0, 0.0, 0.0]
        loss, margin = self._losses(model, batch)
        return [loss.sum().item(), float(len(loss)), margin.sum().item(), (margin > 0).sum().item()]

    def held_out_metrics(self, sums: list[float]) -> dict[str, float]:
        pairs = max(1.0, sums[1])
        return {"loss": sums[0] / pairs, "margin": sums[2] / pairs, "accuracy": sums[3] / pairs}


class PairTrainer(MeanOfPairs):
    """Chosen and rejected replies by turns. ``reference`` is a frozen model; None means the trained one
    without its adapter (ORPO and SimPO need no reference)."""

    def __init__(self, *, reference: Any, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self.settings, self.beta, self.kind = settings, settings.pref_beta, settings.pref_loss
        self.reference = reference
        if reference is not None:
            self.reference = reference.eval().requires_grad_(False).to(self.args.device)

    def _losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        sums, counts = log_probabilities(model, batch)
        reference = sums.detach()
        if self.kind not in ("orpo", "simpo"):  # every process: sharded weights are gathered
            with torch.no_grad(), reference_model(self, model) as frozen:
                reference, _ = log_probabilities(frozen, batch)
        if not batch["num_targets"]:  # a filler row
            return sums, sums
        if self.kind == "orpo":  # odds of the mean token's probability (arXiv:2403.07691)
            means = (sums / counts).view(-1, 2)  # [n, 2]
            odds = means - torch.log1p(-means.exp())
            ratio = odds[:, 0] - odds[:, 1]
            return -means[:, 0] - self.beta * logsigmoid(ratio), self.beta * ratio.detach()
        if self.kind == "simpo":  # rewards are mean log-probabilities (arXiv:2405.14734)
            means = (sums / counts).view(-1, 2)  # [n, 2]
            margin = self.beta * (means[:, 0] - means[:, 1])
            loss = -logsigmoid(margin - self.settings.simpo_gamma)
            return loss - self.settings.pref_ftx * means[:, 0], margin.detach()
        gains = (sums - reference).view(-1, 2)  # [n, 2]
        if self.kind == "ipo":  # per token (Azar et al., 2023, arXiv:2310.12036)
            gains = gains / counts.view(-1, 2)
        margin = gains[:, 0] - gains[:, 1]
        if self.kind == "ipo":
            loss = (margin - 1 / (2 * self.beta)) ** 2
        elif self.kind == "hinge":
            loss = (1 - self.beta * margin).relu()
        else:
            swapped = self.settings.dpo_label_smoothing  # cDPO
            logits = self.beta * margin
            loss = -(1 - swapped) * logsigmoid(logits) - swapped * logsigmoid(-logits)
        if self.settings.pref_ftx:
            loss = loss - self.settings.pref_ftx * (sums / counts).view(-1, 2)[:, 0]
        return loss, self.beta * margin.detach()


class KtoTrainer(PairTrainer):
    """``examples`` alternate between a tagged reply and the mismatched one that ``mismatched`` adds."""

    def _losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each reply, and its reward above the reference point, negated for bad replies, [n]."""
        sums, counts = log_probabilities(model, batch)
        with torch.no_grad(), reference_model(self, model) as frozen:
            reference, _ = log_probabilities(frozen, batch)
        count = len(sums) // 2 if batch["num_targets"] else 0  # none in a filler row
        gains = (sums - reference)[: 2 * count].view(count, 2)  # [n, 2]
        # The distance to the reference, by the mismatched replies of this micro-batch on all processes.
        other = gains[:, 1].detach()
        total = self.accelerator.reduce(
            torch.stack([other.sum(), other.new_tensor(float(len(other)))]), "sum"
        )
        distance = (total[0] / total[1].clamp(min=1)).clamp(min=0)
        if not count:
            return sums, sums
        good = batch["desirable"].view(-1, 2)[:, 0]
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, self.settings.kto_chosen_weight, self.settings.kto_rejected_weight)
        reward = sign * self.beta * (gains[:, 0] - distance)
        loss = weight * (1 - reward.sigmoid())
        if self.settings.pref_ftx:
            loss = loss - self.settings.pref_ftx * torch.where(good, (sums / counts).view(-1, 2)[:, 0], 0.0)
        return loss, reward.detach()

"""Distillation: learning a teacher's probabilities of every token (Hinton et al., 2015, arXiv:1503.02531) by
the forward or reverse Kullback-Leibler divergence, or the generalised Jensen-Shannon divergence between them
(Agarwal et al., 2024, arXiv:2306.13649).

The teacher computes hidden states of the same row; its logits, and the divergence, exist for a part of the
tokens at a time and are computed again in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from xverse.finetune.preferences import logits_with_loss
from xverse.finetune.settings import Settings
from xverse.finetune.trainer import Batch, FinetuneTrainer
from xverse.model import Packed
from xverse.model.chunks import loss_chunk
from xverse.model.transformer import XverseForCausalLM


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Between log-probabilities [N, V] in nats, [N]: KL(teacher ‖ student) for ``beta`` 0, KL(student ‖
    teacher) for 1, otherwise beta · KL(teacher ‖ m) + (1 - beta) · KL(student ‖ m), where m is beta · teacher
    + (1 - beta) · student."""
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(-1)
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(-1)
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    to_teacher = (teacher.exp() * (teacher - mixed)).sum(-1)
    return beta * to_teacher + (1 - beta) * (student.exp() * (student - mixed)).sum(-1)


class DistillationTrainer(FinetuneTrainer):
    """Learns from ``teacher``, a plain model with the same tokens, and from the tokens themselves."""

    def __init__(self, *, teacher: XverseForCausalLM, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.settings = settings

    def batch_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        count = kwargs.get("num_items_in_batch")
        if count is None:
            count = max(1, inputs["num_targets"])
        # Processes average their gradients, and the count is that of all of them.
        return self._sum(model, inputs) * (self.args.world_size / count)

    def held_out_sums(self, model: Any, batch: Batch) -> list[float]:
        return [self._sum(model, batch).item(), float(batch["num_targets"])]

    def held_out_metrics(self, sums: list[float]) -> dict[str, float]:
        return {"loss": sums[0] / max(1.0, sums[1])}

    def _sum(self, model: Any, batch: Batch) -> Tensor:
        """The loss summed over the tokens with loss of a row of ``row_of``."""
        logits, kept, targets = logits_with_loss(model, batch)
        with torch.no_grad():
            ends, longest = batch["cu_seq_lens_q"], batch["max_length_q"]
            context = Packed.flattened(ends, longest, batch["position_ids"])
            hidden = self.teacher.model(batch["input_ids"], context)[0, kept]  # [K, D]
        total = 0.0 * logits.sum() if not len(kept) else logits.new_zeros((), dtype=torch.float32)
        size = loss_chunk(logits.shape[1], logits.device.type)
        for start in range(0, len(kept), size):
            part = slice(start, start + size)
            total = total + checkpoint(
                self._part, logits[part], hidden[part], targets[part], use_reentrant=False
            )
        return total

    def _part(self, logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of logits [C, V] against the teacher's hidden states [C, D]."""
        weight, temperature = self.settings.distillation_weight, self.settings.distillation_temperature
        with torch.no_grad():
            teacher = self.teacher.lm_head(hidden).float().div(temperature).log_softmax(-1)  # [C, V]
        student = logits.float().div(temperature).log_softmax(-1)
        apart = divergence(student, teacher, self.settings.distillation_beta).sum()
        # Gradients of softened probabilities shrink with the square of the temperature.
        loss = weight * temperature**2 * apart
        if weight < 1:
            loss = loss + (1 - weight) * cross_entropy(logits.float(), targets, reduction="sum")
        return loss

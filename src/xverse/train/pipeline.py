"""Pipeline parallelism: the layers divided over several processes, interleaved (Narayanan et al., 2021,
arXiv:2104.04473), by torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

from xverse.model import AttentionContext, XverseForCausalLM
from xverse.plan.layout import Layout
from xverse.train.tensor import head_loss


def keep_stages(model: XverseForCausalLM, place: int, layout: Layout) -> None:
    """Remove from ``model`` all that process ``place`` of the pipeline does not compute; names stay. Stage s,
    a run of layers, belongs to process s mod n; the first has the embedding, the last norm and head."""
    kept = {i for s in range(place, layout.stages, layout.pipeline) for i in _layers(model, s, layout)}
    for i in set(range(model.config.num_hidden_layers)) - kept:
        del model.model.layers._modules[str(i)]  # `del layers[i]` would renumber the others
    if place > 0:
        del model.model.embed_tokens
    if place < layout.pipeline - 1:
        del model.model.norm, model.lm_head


def _layers(model: XverseForCausalLM, stage: int, layout: Layout) -> range:
    count = model.config.num_hidden_layers // layout.stages
    return range(stage * count, (stage + 1) * count)


class Stage(nn.Module):
    """A run of layers. The first stage takes tokens int64 [B, T], the others hidden states [B, T, D]; the
    last returns the loss times ``scale``, float32 [], the others hidden states.

    Each stage builds its attention context from ``document_ids`` [B, T], which all processes have.
    """

    def __init__(
        self,
        model: XverseForCausalLM,
        stage: int,
        layout: Layout,
        context: Callable[[Tensor], AttentionContext],
    ) -> None:
        super().__init__()
        layers = dict(model.model.layers.named_children())
        self.layers = nn.ModuleList(layers[str(i)] for i in _layers(model, stage, layout))
        self.embed_tokens = model.model.embed_tokens if stage == 0 else None
        last = stage == layout.stages - 1
        self.norm = model.model.norm if last else None
        self.lm_head = model.lm_head if last else None
        self.rope, self.context = model.model.rope, context
        self.scale, self.z_loss = 1.0, 0.0

    def forward(self, x: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        """``x``: tokens or hidden states; ``targets`` int64 [B, T]."""
        context = self.context(document_ids)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)  # [B, T, D]
        rope = self.rope(context, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, context)  # [B, T/tensor, D]
        if self.norm is None or self.lm_head is None:
            return x
        return head_loss(self.lm_head, self.norm(x), targets, self.z_loss) * self.scale


class Pipeline:
    """The stages of this process, and the schedule of batches through all stages."""

    def __init__(self, stages: list[Stage], group: dist.ProcessGroup, layout: Layout, hidden: int) -> None:
        self.stages, self._group, self._layout, self._hidden = stages, group, layout, hidden
        self._place = dist.get_rank(group)
        self._last = layout.pipeline - 1
        self._schedules: dict[tuple[int, ...], ScheduleInterleaved1F1B] = {}

    def backward(
        self,
        tokens: Tensor,
        targets: Tensor,
        document_ids: Tensor,
        *,
        micro: int,
        scale: float,
        z_loss: float,
    ) -> Tensor:
        """Accumulate ``scale`` · the loss's gradients of int64 [B, T] each, ``micro`` rows at a time; returns
        the loss, float32 [], unscaled and detached, in the last process, and 0 in the others."""
        for stage in self.stages:
            stage.scale, stage.z_loss = scale, z_loss
        losses: list[Tensor] = []
        schedule = self._schedule(len(tokens) // micro, micro, tokens)
        first = (tokens,) if self._place == 0 else ()
        schedule.step(
            *first,
            target=targets if self._place == self._last else None,
            losses=losses,
            return_outputs=False,
            targets=targets,
            document_ids=document_ids,
        )
        if self._place < self._last:
            return torch.zeros((), device=tokens.device)
        return torch.stack(losses).sum().detach() / scale

    @torch.no_grad()
    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        """The loss, float32 [], of int64 [B, T] each in all processes, one stage after the other."""
        shape = self._shape(len(tokens), tokens)
        x = tokens
        own_stages = iter(self.stages)
        for s in range(self._layout.stages):
            after = (s + 1) % self._layout.pipeline
            if s % self._layout.pipeline == self._place:
                stage = next(own_stages)
                stage.scale = 1.0
                x = stage(x, targets, document_ids)
                if s + 1 < self._layout.stages:
                    dist.send(x.contiguous(), group=self._group, group_dst=after)
            elif after == self._place and s + 1 < self._layout.stages:
                x = torch.empty(shape, device=tokens.device)
                dist.recv(x, group=self._group, group_src=s % self._layout.pipeline)
        total = x if self._place == self._last else torch.empty((), device=tokens.device)
        dist.broadcast(total, group=self._group, group_src=self._last)
        return total

    def settle(self) -> None:
        """Free the parameters that FSDP left gathered after ``loss``."""
        for stage in self.stages:
            if isinstance(stage, FSDPModule):
                stage.reshard()

    def _shape(self, rows: int, tokens: Tensor) -> tuple[int, ...]:
        """Shape of the hidden states between stages: [rows, T/tensor, D]."""
        return rows, tokens.shape[1] // self._layout.tensor, self._hidden

    def _schedule(self, batches: int, micro: int, tokens: Tensor) -> ScheduleInterleaved1F1B:
        key = (batches, micro, tokens.shape[1])
        if key not in self._schedules:
            device, count = tokens.device, self._layout.stages
            ids = torch.empty((micro, tokens.shape[1]), dtype=torch.int64, device="meta")
            states = torch.empty(self._shape(micro, tokens), device="meta", requires_grad=True)
            stages = []
            for number, stage in enumerate(self.stages):
                s = self._place + number * self._layout.pipeline
                out = torch.empty((), device="meta", requires_grad=True) if s == count - 1 else states
                stages.append(
                    PipelineStage(stage, s, count, device, ids if s == 0 else states, out, group=self._group)
                )
            self._schedules[key] = ScheduleInterleaved1F1B(
                list(stages), batches, loss_fn=lambda loss, _: loss, scale_grads=False
            )
        return self._schedules[key]

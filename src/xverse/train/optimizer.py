"""Optimizers and learning-rate schedules. The loop sets the learning rate before every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from xverse.train.settings import TrainConfig, decay_start


def make_adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter, 2017); norm weights and the embedding are not decayed."""
    _, decayed, plain = parameter_groups(model, muon=False)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the recipe."""
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw" and config.optimizer_dtype == "float32":
        return make_adamw(model, weight_decay=config.weight_decay, betas=betas)
    return make_muon(
        model,
        config.weight_decay,
        muon=config.optimizer == "muon",
        betas=betas,
        momentum=config.muon_momentum,
        state_dtype=getattr(torch, config.optimizer_dtype),
        compute_dtype=getattr(torch, config.dtype),
    )


def make_muon(model: nn.Module, weight_decay: float, muon: bool = True, **options: Any) -> MuonAdamW:
    """``MuonAdamW`` with ``options``; without ``muon`` AdamW has the layers' matrices, too."""
    matrices, decayed, plain = parameter_groups(model, muon)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "muon": True},
        {"params": decayed, "weight_decay": weight_decay, "muon": False},
        {"params": plain, "weight_decay": 0.0, "muon": False},
    ]
    return MuonAdamW([group for group in groups if group["params"]], **options)


def parameter_groups(
    model: nn.Module, muon: bool
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The layers' matrices (for Muon), other decayed parameters, and parameters without decay."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() == 1 or name.endswith("embed_tokens.weight"):
            plain.append(parameter)
        elif muon and not name.endswith("lm_head.weight"):
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    return matrices, decayed, plain


# Values of a tensor that AdamW updates at a time; each part takes some 15 launches on a GPU.
_PART = {"cpu": 2**20, "cuda": 2**26}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups with ``muon``, AdamW for the others, both with states in ``state_dtype``.

    Muon (Jordan et al., 2024): the momentum, orthogonalised by Newton-Schulz; scaled by 0.2 · sqrt(max(rows,
    columns)) as in Moonlight (Liu et al., 2025, arXiv:2502.16982), so that AdamW's learning rate and decay
    apply. Every process orthogonalises the whole of a sharded matrix. States in bfloat16 are rounded
    stochastically, since rounding to nearest would freeze a slow moving average. The random bits are a
    function of (step, parameter, shard), so that a resumed run and copies of a shard round alike.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        state_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "muon": False})
        self._betas, self._eps, self._momentum = betas, eps, momentum
        self._state_dtype, self._compute_dtype = state_dtype, compute_dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in ("momentum_buffer",) if group["muon"] else ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=self._state_dtype)
                state["step"] += 1
                local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
                seed = (int(state["step"]) * 1_000_003 + index) * 65_537 + shard_number(parameter)
                generator = torch.Generator(parameter.device).manual_seed(seed)
                update = self._muon if group["muon"] else self._adamw
                update(parameter, state, group["lr"], generator)

    def _adamw(self, parameter: Tensor, state: dict[str, Tensor], lr: float, generator: Any) -> None:
        beta1, beta2 = self._betas
        step = float(state["step"])
        flat = [local(x).view(-1) for x in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        flat.append(local(parameter.grad).reshape(-1))  # type: ignore[arg-type]
        # In parts, because the temporaries take four times the memory of a part.
        size = _PART.get(parameter.device.type, _PART["cpu"])
        for weight, average, square, gradient in zip(*(x.split(size) for x in flat), strict=True):
            first = average.float().lerp(gradient, 1 - beta1)
            second = square.float().mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            bottom = (second / (1 - beta2**step)).sqrt_().add_(self._eps)
            weight.addcdiv_(first, bottom, value=-lr / (1 - beta1**step))
            store(average, first, generator)
            store(square, second, generator)

    def _muon(self, parameter: Tensor, state: dict[str, Tensor], lr: float, generator: Any) -> None:
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        momentum = local(state["momentum_buffer"]).float().lerp(local(gradient), 1 - self._momentum)
        ahead = local(gradient).lerp(momentum, self._momentum)  # Nesterov
        store(local(state["momentum_buffer"]), momentum, generator)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            shape, stride = parameter.shape, parameter.stride()
            shard = DTensor.from_local(ahead, mesh, placements, shape=shape, stride=stride)
            whole = orthogonal(shard.full_tensor(), self._compute_dtype)
            everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)
            ahead = everywhere.redistribute(mesh, placements).to_local()
        else:
            ahead = orthogonal(ahead, self._compute_dtype)
        local(parameter).add_(ahead, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """Approximately U Vᵀ of ``matrix`` [R, C] = U S Vᵀ, in its dtype: the quintic Newton-Schulz iteration of
    Jordan et al. (2024), computed in ``dtype``, brings the singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(dtype)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def store(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Store float32 ``value`` in ``target`` of the same shape; bfloat16 is rounded stochastically
    (unbiased)."""
    if target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    shape, device = value.shape, value.device
    noise = torch.randint(0, 1 << 16, shape, dtype=torch.int32, device=device, generator=generator)
    bits = (value.contiguous().view(torch.int32) + noise) & -(1 << 16)
    target.copy_(bits.view(torch.float32))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_number(tensor: Tensor) -> int:
    """The number of this process's part of a tensor; equal for copies of one part."""
    number = 0
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                mesh = tensor.device_mesh
                number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear warm-up to the peak, then the recipe's schedule.

    cosine: half a cosine down to ``final_lr_ratio`` · peak at the last step. wsd (Hu et al., 2024,
    arXiv:2404.06395): the peak until the last ``decay_share`` of the steps, then down to ``final_lr_ratio`` ·
    peak as 1 - sqrt (Hägele et al., 2024, arXiv:2405.18392).
    """
    peak, final, steps = config.learning_rate, config.final_lr_ratio, config.steps
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "wsd":
        first = decay_start(steps, config.decay_share)
        progress = max(0.0, (step - first + 1) / (steps - first))
        return peak * (1 - (1 - final) * math.sqrt(progress))
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

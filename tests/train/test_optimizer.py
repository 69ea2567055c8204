"""Optimizers, schedules, z-loss and recomputation against plain references."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xverse.data.feed import PretrainFeed
from xverse.model import Packed, XverseConfig, XverseForCausalLM, init_weights, linear_cross_entropy
from xverse.train import TrainConfig
from xverse.train.blocks import prepare_blocks
from xverse.train.loop import train_step
from xverse.train.optimizer import MuonAdamW, learning_rate, make_optimizer, orthogonal, store
from xverse.train.plot import read_metrics

pytestmark = pytest.mark.slow

CONFIG = TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, dtype="float32")


def tiny(shape: dict[str, int]) -> XverseForCausalLM:
    model = XverseForCausalLM(XverseConfig(**shape))
    init_weights(model, seed=0)
    return model


def steps_with(
    optimizer: Callable[[list[nn.Parameter]], Any], start: torch.Tensor, count: int = 8
) -> torch.Tensor:
    """Weights after some steps under gradients that do not depend on the optimizer."""
    parameter = nn.Parameter(start.clone())
    taking = optimizer([parameter])
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        parameter.grad = torch.randn(start.shape, generator=generator)
        for group in taking.param_groups:
            group["lr"] = 0.02
        taking.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_muon_equals_torchs(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = steps_with(lambda p: MuonAdamW([{"params": p, "weight_decay": 0.1, "muon": True}]), start)
    theirs = steps_with(
        lambda p: torch.optim.Muon(p, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"), start
    )
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # both iterate in bfloat16
    assert (ours - start).abs().max() > 0.05


def test_orthogonal_brings_singular_values_near_one() -> None:
    matrix = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonal(matrix, torch.float32)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (result * (u @ v)).sum() / (result.norm() * (u @ v).norm()) > 0.98


def test_own_adamw_equals_torchs() -> None:
    start = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    ours = steps_with(lambda p: MuonAdamW([{"params": p, "weight_decay": 0.1}], betas=(0.9, 0.95)), start)
    theirs = steps_with(lambda p: torch.optim.AdamW(p, weight_decay=0.1, betas=(0.9, 0.95)), start)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bfloat16_states_are_right_on_average_and_the_same_each_time() -> None:
    value = torch.full((200_000,), 1.001)  # between 1 and 1.0078
    rounded = torch.empty(200_000, dtype=torch.bfloat16)
    store(rounded, value, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert rounded.float().mean() == pytest.approx(1.001, abs=2e-5)
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))

    def optimizer(parameters: list[nn.Parameter]) -> MuonAdamW:
        return MuonAdamW([{"params": parameters}], betas=(0.9, 0.999), state_dtype=torch.bfloat16)

    once, twice = steps_with(optimizer, start, 60), steps_with(optimizer, start, 60)
    assert torch.equal(once, twice)
    exact = steps_with(lambda p: torch.optim.AdamW(p, weight_decay=0.0, betas=(0.9, 0.999)), start, 60)
    moved = (exact - start).norm()
    assert (once - exact).norm() < 0.05 * moved


def test_which_parameters_muon_trains(tiny_shape: dict[str, int]) -> None:
    model = tiny(tiny_shape)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, dataclasses.replace(CONFIG, optimizer="muon"))
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    assert len(groups[0]) == 2 * 7
    assert all("proj" in name for name in groups[0])
    assert groups[1] == ["lm_head.weight"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize(
    "choice",
    [
        {"optimizer": "muon", "schedule": "wsd"},
        {"optimizer_dtype": "bfloat16"},
        {"optimizer": "muon", "optimizer_dtype": "bfloat16", "z_loss": 1e-4},
        {"activation_checkpointing": "full"},
    ],
    ids=str,
)
def test_choices_learn_and_resume_exactly(
    choice: dict[str, Any], fit_tiny: Callable[..., XverseForCausalLM], tmp_path: Path
) -> None:
    def losses(out: Path) -> list[float]:
        return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]

    settings = {"steps": 30, "checkpoint_every": 17, "keep_checkpoints": 3, "learning_rate": 1e-2, **choice}
    whole = fit_tiny(tmp_path / "whole", **settings)
    found = losses(tmp_path / "whole")
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - 0.8, "it learns"
    out = tmp_path / "resumed"
    (out / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-00000017").rename(out / "checkpoints" / "step-00000017")
    resumed = fit_tiny(out, **settings)
    assert losses(out) == losses(tmp_path / "whole")[17:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_wsd_schedule() -> None:
    config = TrainConfig(
        steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10, schedule="wsd", decay_share=0.25
    )

    def at(step: int) -> float:
        return learning_rate(step, config)

    assert at(0) == pytest.approx(0.2)
    assert {at(step) for step in range(9, 75)} == {2.0}
    assert at(75) == pytest.approx(2.0 * (1 - 0.9 * math.sqrt(1 / 25)))
    assert at(99) == pytest.approx(0.2)
    rates = [at(step) for step in range(9, 100)]
    assert rates == sorted(rates, reverse=True)


def test_z_loss_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (30, 50))
    targets = torch.randint(0, 50, (30,), generator=generator)
    targets[4] = -100
    ours = linear_cross_entropy(hidden, weight, targets, reduction="sum", chunk=7, z_loss=0.01)
    logits = hidden @ weight.T
    plain = nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    plain = plain + 0.01 * (logits.logsumexp(1) ** 2)[targets != -100].sum()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    found, wanted = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Kept(TorchDispatchMode):
    """Which storages are made under it, whoever holds them: autograd, or selective recomputation's cache."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                reference = StorageWeakRef(leaf.untyped_storage())
                self.made[reference.cdata] = reference, leaf.untyped_storage().nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_changes_no_gradient_and_keeps_less(
    kind: str, dtype: str, feed: PretrainFeed, tiny_shape: dict[str, int]
) -> None:
    batch = feed.batch(0, 4)
    results: dict[str, Any] = {}
    kept: dict[str, int] = {}
    for choice in ("none", "selective", "full"):
        config = dataclasses.replace(CONFIG, activation_checkpointing=choice, dtype=dtype)
        model = tiny({**tiny_shape, "num_hidden_layers": 4})
        prepare_blocks(model, config)
        with Kept() as memory, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.model(batch.tokens, Packed(batch.document_ids))
            kept[choice] = memory.bytes()
        del hidden
        loss, norm = train_step(model, batch, config)
        results[choice] = loss, norm, [p.grad for p in model.parameters()]
    assert results["none"][:2] == results[kind][:2]
    for one, other in zip(results["none"][2], results[kind][2], strict=True):
        assert torch.equal(one, other)
    assert kept["full"] < 0.35 * kept["none"], kept
    assert kept["full"] < kept["selective"] < 0.85 * kept["none"], kept


@pytest.mark.thorough
def test_compiled_layers_compute_the_same(feed: PretrainFeed, tiny_shape: dict[str, int]) -> None:
    results = []
    for compiled in (False, True):
        config = dataclasses.replace(CONFIG, compile=compiled)
        model = tiny({**tiny_shape, "num_hidden_layers": 1})
        prepare_blocks(model, config)
        for step in range(3):  # of other documents each
            loss, norm = train_step(model, feed.batch(4 * step, 4 * step + 4), config)
        results.append((loss, norm))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_a_batch_grows_in_equal_stages() -> None:
    config = dataclasses.replace(CONFIG, steps=50, batch_size=12, batch_ramp_start=3, batch_ramp_steps=30)
    assert [config.rows(step) for step in (0, 9, 10, 19, 20, 29, 30, 49)] == [3, 3, 6, 6, 9, 9, 12, 12]
    for step in (0, 1, 15, 30, 50):
        assert config.sequences(step) == sum(config.rows(each) for each in range(step))
    assert [CONFIG.rows(0), CONFIG.sequences(3)] == [4, 12]
    for wrong, said in (
        ({"batch_ramp_start": 5}, "batch_size 12 is not a multiple of batch_ramp_start 5"),
        ({"batch_ramp_steps": 0}, "must be set together"),
        ({"batch_ramp_steps": 51}, "batch_ramp_steps 51 exceeds steps 50"),
        ({"parallel": "fsdp", "pipeline": 2}, "batch_ramp_start does not support pipeline"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(config, **wrong)


def test_compile_and_selective_are_refused() -> None:
    with pytest.raises(ValueError, match="compile does not support activation_checkpointing selective"):
        dataclasses.replace(CONFIG, compile=True, activation_checkpointing="selective")

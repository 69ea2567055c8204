"""``train_worker.py JOB``: the process of one side of ``xverse bench train``.

For each line of stdin, a number of steps, it runs them and prints seconds, last loss and peak memory as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from xverse import hardware
from xverse.data.feed import Batch
from xverse.device import guard
from xverse.formats.write import llama_config
from xverse.model import IGNORE, XverseConfig, XverseForCausalLM, init_weights
from xverse.train.blocks import prepare_blocks
from xverse.train.loop import TrainConfig, train_step
from xverse.train.optimizer import make_adamw

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
Gate = Callable[[], bool]  # blocks until this side may run its next step; False: stop


def random_batch(config: XverseConfig, batch_size: int, length: int) -> Batch:
    """One document of random tokens per row; the target of each position but the last is the next token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (batch_size, length), generator=generator)  # [B, T]
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    return Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.int32))


def child(text: str) -> None:
    """Run the side that the JSON ``text`` describes."""
    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    config = XverseConfig.from_json(job["config"])
    model = XverseForCausalLM(config)
    init_weights(model, seed=0)
    device = torch.device(job["device"])
    model.to(device)
    batch = random_batch(config, job["batch_size"], job["length"])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout, which carries the answers
    state: dict[str, Any] = {"left": 0, "all": 0, "start": 0.0, "loss": 0.0}

    def gate() -> bool:
        if state["left"] == 0:
            if state["all"]:
                seconds = time.perf_counter() - state["start"]
                answer = {"seconds": seconds, "loss": state["loss"], "memory": hardware.peak_memory(device)}
                print(json.dumps(answer), file=answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                return False
            state["left"] = state["all"] = int(line)
            state["start"] = time.perf_counter()
        state["left"] -= 1
        return True

    with guard(device):
        (_ours if job["side"] == "xverse" else _theirs)(model, batch, gate, state)


def _ours(model: XverseForCausalLM, batch: Batch, gate: Gate, state: dict[str, Any]) -> None:
    config = TrainConfig(
        steps=1, batch_size=len(batch.tokens), learning_rate=LEARNING_RATE, grad_clip=CLIP, dtype="bfloat16"
    )
    prepare_blocks(model, config)
    hardware.keep_freed_memory()
    optimizer = make_adamw(model, weight_decay=WEIGHT_DECAY, betas=BETAS)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    while gate():
        state["loss"], _ = train_step(model, batch, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _theirs(model: XverseForCausalLM, batch: Batch, gate: Gate, state: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    values = llama_config(model.config, torch.float32)
    values.pop("torch_dtype")
    peer = LlamaForCausalLM(LlamaConfig(**{**values, "use_cache": False})).train()
    peer.load_state_dict(model.state_dict())
    device = next(model.parameters()).device

    class Recorded(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            state["loss"] = loss.item()
            return loss

    class Gated(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not gate():
                sys.exit(0)

    class Same(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 2**30

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = batch.tokens[index % len(batch.tokens)]
            return {"input_ids": row, "labels": row}  # the model shifts the labels

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, use_cpu=device.type == "cpu", bf16=True,
            per_device_train_batch_size=len(batch.tokens), max_steps=2**20,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, optim="adamw_torch_fused",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        Recorded(peer, args, train_dataset=Same(), callbacks=[Gated()]).train()


if __name__ == "__main__":
    child(sys.argv[1])

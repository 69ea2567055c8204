"""One contender of the study ``finetune``: steps of full fine-tuning in its own process.

All train equal weights on equal examples with equal loss masks, ``batch_size`` rows a step, in bf16 over
float32 parameters with fused AdamW. Ours: ``xverse`` one example a row, ``xverse-packed`` rows filled up.
The peers: transformers' Trainer over its Llama, rows padded to the longest of a batch; trl's SFTTrainer with
packing, by both of its strategies.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from xverse.finetune.encode import Example
from xverse.hardware import process_memory

CONTENDERS = ("xverse", "transformers", "xverse-packed", "trl-bfd", "trl-wrapped")


def child(text: str) -> None:
    """Train as the JSON job ``text`` says; print tokens, seconds per step and peak memory as JSON."""
    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    started: list[float] = []
    ended: list[float] = []
    tokens: list[int] = []
    rows: list[Example] = [Example(*row) for row in json.loads(Path(job["examples"]).read_text())]
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            started.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ended.append(time.perf_counter())

    trainer = _trainer(job, rows, Clock())
    collate = trainer.data_collator

    def counting(examples: Any) -> Any:
        batch = collate(examples)
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        tokens.append(int(mask.sum()) if mask is not None else ids.numel())
        return batch

    trainer.data_collator = counting
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [end - start for start, end in zip(started, ended, strict=True)]
    result = {"tokens": tokens[: len(steps)], "seconds": steps, "losses": curve}
    print(json.dumps({**result, "peak_bytes": process_memory("VmHWM")}), flush=True)


def _trainer(job: dict[str, Any], rows: list[Example], clock: Any) -> Any:
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    common: dict[str, Any] = {
        "output_dir": job["out"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": 2e-5,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    side = job["side"]
    if side.startswith("xverse"):
        from transformers import AutoModelForCausalLM

        from xverse.finetune.build import as_autocast
        from xverse.finetune.trainer import FinetuneTrainer

        model: Any = AutoModelForCausalLM.from_pretrained(job["xverse"], dtype=torch.float32)
        model.model.embed_tokens.register_forward_hook(as_autocast)
        args = TrainingArguments(**common, remove_unused_columns=False, label_names=["labels"])
        packed = job["length"] if side == "xverse-packed" else None
        trainer: Any = FinetuneTrainer(
            model=model, args=args, examples=rows, held_out=[], row_length=packed, pad_id=1, callbacks=[clock]
        )
    else:
        trainer = _peer(job, rows, clock, common)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _peer(job: dict[str, Any], rows: list[Example], clock: Any, common: dict[str, Any]) -> Any:
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
    )

    labels = [
        [
            token if kept and place else -100
            for place, (token, kept) in enumerate(zip(e.ids, e.mask, strict=True))
        ]
        for e in rows
    ]
    dataset = Dataset.from_dict({"input_ids": [e.ids for e in rows], "labels": labels})
    model = LlamaForCausalLM.from_pretrained(job["llama"], dtype=torch.float32, use_cache=False)
    tokenizer = AutoTokenizer.from_pretrained(job["llama"])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    if job["side"] == "transformers":
        with_masks = dataset.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
        return Trainer(
            model=model,
            args=TrainingArguments(**common),
            train_dataset=with_masks,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[clock],
        )
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        **common,
        packing=True,
        packing_strategy=job["side"].removeprefix("trl-"),
        max_length=job["length"],
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]
    )


if __name__ == "__main__":
    child(sys.argv[1])

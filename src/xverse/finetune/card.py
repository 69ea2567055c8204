"""The model card of a fine-tuned model: base, data, settings, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from xverse import __version__
from xverse.files import write_text
from xverse.finetune.encode import Data
from xverse.finetune.settings import Settings, to_values
from xverse.markdown import table

KINDS = {"full": "all weights", "lora": "a LoRA adapter", "freeze": "some layers"}


def write_card(out: Path, settings: Settings, data: Data, metrics: dict[str, float], state: Any) -> None:
    """Write ``out/README.md``. ``state`` is Trainer's."""
    import torch
    import transformers

    kind = "a DoRA adapter" if settings.use_dora else KINDS[settings.finetuning_type]
    adapter = settings.finetuning_type == "lora"
    lines = ["---"]
    if "/" in settings.model_name_or_path and not Path(settings.model_name_or_path).exists():
        lines.append(f"base_model: {settings.model_name_or_path}")
    lines += [f"library_name: {'peft' if adapter else 'transformers'}", "tags: [xverse]", "---", ""]
    lines += [f"# {out.name}", ""]
    lines += [f"{settings.model_name_or_path}, fine-tuned ({settings.stage}, {kind}).", ""]
    lines += ["## Data", "", *(f"- {note}" for note in data.notes)]
    sizes = [len(part) // (2 if settings.pairs else 1) for part in (data.train, data.valid)]
    unit = {"dpo": "pairs", "rm": "pairs", "grpo": "prompts"}.get(settings.stage, "examples")
    lines += [f"- {sizes[0]} {unit} to train on, {sizes[1]} held out", ""]
    figures = {"steps": state.global_step, "epochs": state.epoch, "best loss": state.best_metric}
    evaluated = ("loss", "perplexity", "margin", "accuracy", "reward")
    figures |= {name: metrics.get(name) for name in ("train_loss", *(f"eval_{name}" for name in evaluated))}
    for name in ("memory_predicted_gb", "memory_peak_gb"):
        figures[f"{name.replace('_', ' ').removesuffix(' gb')}, GB per process"] = metrics.get(name)
    best = state.best_model_checkpoint
    figures["best checkpoint"] = Path(best).name if best else None
    rows = [
        (name, f"{value:.4f}" if isinstance(value, float) else str(value))
        for name, value in figures.items()
        if value is not None
    ]
    lines += ["## Figures", "", *table(["", ""], rows, "---")]
    scales = {
        "dpo": "DPO's, per pair",
        "kto": "KTO's, per reply",
        "rm": "Bradley-Terry's, per pair",
        "grpo": f"GRPO's ({settings.loss_type}); held out, the negative reward",
    }
    scale = scales.get(settings.stage, "in nats per token with loss")
    if settings.teacher:
        scale += f", with the divergence from {settings.teacher}"
    lines += ["", f"Losses are {scale}.", ""]
    if data.bits:
        lines += ["## Languages", "", "Bits per byte of held-out text of pretraining.", ""]
        before = {name: f"{value:.3f}" for name, value in data.bits["before"].items()}
        bits = [(name, before.get(name, ""), f"{value:.3f}") for name, value in data.bits["after"].items()]
        lines += [*table(["language", "before", "after"], bits, "---:"), ""]
    if (out / "loss.png").exists():
        lines += ["![loss](loss.png)", ""]
    text = yaml.safe_dump(to_values(settings), sort_keys=False, allow_unicode=True)
    lines += ["## Settings", "", "```yaml", text.rstrip(), "```", ""]
    lines.append(f"xverse {__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    write_text(out / "README.md", "\n".join(lines) + "\n")

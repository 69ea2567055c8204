"""Reward models: a scalar for each reply, learnt from preference pairs (Bradley and Terry, 1952; of replies
Ouyang et al., 2022, arXiv:2203.02155), and their use as a reward of GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from xverse.config import UserError
from xverse.finetune.encode import Prompt
from xverse.finetune.preferences import MeanOfPairs
from xverse.finetune.rewards import Completion
from xverse.finetune.trainer import Batch, inputs_of
from xverse.formats import ModelDirectory, load_model
from xverse.formats.adapters import CONFIG, check_base, fingerprint, peft_config, peft_model
from xverse.hf.classification import XverseForSequenceClassification
from xverse.texts import read_object
from xverse.tokenizer import Tokenizer

_AT_ONCE = 16  # replies that are scored together


def classifier(source: ModelDirectory, dtype: torch.dtype | None = None) -> XverseForSequenceClassification:
    """The language model of a directory below a new head."""
    pad_id = max(0, source.tokenizer.pad_id)
    return XverseForSequenceClassification.of(load_model(source, dtype), source.generation_config, pad_id)


class RewardTrainer(MeanOfPairs):
    """Learns that the chosen reply's score exceeds the rejected one's, by the pair's margin; ``centring``
    weighs the squared sum of both (Eisenstein et al., 2023, arXiv:2312.09244)."""

    def __init__(self, *, centring: float | None, **options: Any) -> None:
        super().__init__(**options)
        self.centring = centring or 0.0

    def _losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        ends = batch["cu_seq_lens_q"][1:].long() - 1  # [2n]
        scores = model(**inputs_of(batch), last_tokens=ends).logits[:, 0].float()  # [2n]
        if not batch["num_targets"]:  # a filler row
            return 0.0 * scores, scores
        chosen, rejected = scores.view(-1, 2).unbind(1)  # [n]
        margin = chosen - rejected
        loss = -logsigmoid(margin - batch.get("margins", 0.0))
        if self.centring:
            loss = loss + self.centring * (chosen + rejected) ** 2
        return loss, margin.detach()


class RewardModel:
    """The reward model, or the adapter of one, in ``folder``. ``tokenizer`` is that of the model whose
    replies it scores. Raises UserError for a folder that holds no reward model, and for another tokenizer."""

    def __init__(self, folder: str, tokenizer: Tokenizer, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification

        path, adapter = Path(folder), (Path(folder) / CONFIG).is_file()
        self.model: Any
        if adapter:
            values = read_object(path / CONFIG)
            if values.get("task_type") != "SEQ_CLS":
                raise UserError(f"reward_funcs: {folder} holds no reward model's adapter; use stage rm")
            base = ModelDirectory.named(str(values.get("base_model_name_or_path")))
            plain = load_model(base)
            check_base(lambda: fingerprint(plain), path, base.path)
            own = base.tokenizer
            model = XverseForSequenceClassification.of(plain, base.generation_config, max(0, own.pad_id))
            self.model = peft_model(model, path, peft_config(model, path))
        else:
            names = read_object(path / "config.json").get("architectures") or ["nothing"]
            if not any("SequenceClassification" in name for name in names):
                raise UserError(f"reward_funcs: {folder} holds {names[0]}, not a reward model; use stage rm")
            own = ModelDirectory.named(folder).tokenizer
            self.model = AutoModelForSequenceClassification.from_pretrained(folder)
            if self.model.config.num_labels != 1:
                raise UserError(f"reward_funcs: {folder} has {self.model.config.num_labels} outputs, not one")
        if own.hash != tokenizer.hash:
            raise UserError(f"reward_funcs: {folder} has another tokenizer than the model that is trained")
        self.pad_id = max(0, tokenizer.pad_id)
        self.model.config.pad_token_id = self.pad_id
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        rows = [prompt.ids + reply.ids for prompt, reply in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        for start in range(0, len(rows), _AT_ONCE):
            part = [torch.tensor(ids) for ids in rows[start : start + _AT_ONCE]]
            device = next(self.model.parameters()).device
            ids = pad_sequence(part, batch_first=True, padding_value=self.pad_id).to(device)
            mask = pad_sequence([torch.ones_like(row) for row in part], batch_first=True).to(device)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            scores += logits[:, 0].float().tolist()
        return scores

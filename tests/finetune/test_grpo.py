"""GRPO: the loss by its definition, replies by the engine, rewards by rule, runs that go on exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from xverse.cli import main
from xverse.engine.sampling_params import SamplingParams
from xverse.finetune.encode import Example, Prompt
from xverse.finetune.grpo import Groups, GrpoTrainer, Rollout, advantages, row_of
from xverse.finetune.rewards import Completion, Rewards, rules, rules_of
from xverse.finetune.rollouts import Generator, plain_model
from xverse.finetune.settings import Settings, read_settings
from xverse.finetune.trainer import FILLER
from xverse.hf import XverseConfig, XverseForCausalLM
from xverse.train.plot import read_metrics

BASE = {"model_name_or_path": "nano", "dataset": "x", "do_train": True, "output_dir": "out", "stage": "grpo"}


def settings_of(**values: Any) -> Settings:
    return read_settings({**BASE, "max_completion_length": 16, **values}, "test")


def hf_model(config: Any) -> Any:
    torch.manual_seed(0)
    return XverseForCausalLM(XverseConfig.from_model_config(config)).eval()


def trainer_of(
    settings: Settings, model: Any, tokenizer: Any, path: Path, reference: Any = None
) -> GrpoTrainer:
    args = TrainingArguments(output_dir=str(path), use_cpu=True, report_to="none")
    sampling = SamplingParams(max_new_tokens=settings.max_completion_length, temperature=settings.temperature)
    prompt = Prompt([5, 6, 7], [False] * 3, "p[0]")
    trainer = GrpoTrainer(
        model=model,
        args=args,
        examples=[prompt],
        held_out=[],
        row_length=None,
        pad_id=1,
        settings=settings,
        generator=Generator(tokenizer, sampling, (3,), 8),
        rewards=Rewards(settings, lambda folder: lambda *_: []),
        reference=reference,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def plain_loss(
    settings: Settings, model: Any, reference: Any, rollouts: list[Rollout], batches: list[list[int]]
) -> torch.Tensor:
    """The loss of a step in float64, one reply at a time, by the papers' formulas; ``batches``: which replies
    are in which micro-batch."""
    tokens = sum(len(r.logprobs) for r in rollouts)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        in_batch = sum(len(rollouts[i].logprobs) for i in batch)
        for rollout in (rollouts[i] for i in batch):
            ids = torch.tensor([rollout.example.ids])
            mask = torch.tensor(rollout.example.mask[1:])
            logs = [
                (m(input_ids=ids).logits[0, :-1] / settings.temperature)
                .log_softmax(-1)
                .gather(1, ids[0, 1:, None])[:, 0][mask]
                for m in (model, reference)
            ]
            new, ref = logs[0], logs[1].detach()
            old = torch.tensor(rollout.old, dtype=torch.float64)
            sampled = torch.tensor(rollout.logprobs, dtype=torch.float64)
            log_ratio = new - old
            if settings.importance_sampling_level == "sequence":
                log_ratio = log_ratio.mean().expand_as(new)
            ratio, a = log_ratio.exp(), rollout.advantage
            high = settings.epsilon_high or settings.epsilon
            if settings.loss_type == "cispo":
                loss = -ratio.detach().clamp(max=high) * a * new
            else:
                kept = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
                loss = -torch.minimum(kept * a, ratio.clamp(1 - settings.epsilon, 1 + high) * a)
            mode = settings.importance_sampling_mode
            if mode:
                gap = old - sampled
                gap = gap.sum().expand_as(gap) if mode.startswith("sequence") else gap
                weight, low = gap.exp(), settings.importance_sampling_clip_min
                most = settings.importance_sampling_clip_max
                weight = (
                    weight.clamp(low, most)
                    if mode.endswith("truncate")
                    else torch.where((weight < low) | (weight > most), 0.0, weight)
                )
                loss = loss * weight
            loss = loss + settings.beta * ((ref - new).exp() - (ref - new) - 1)
            divisor = {
                "grpo": len(rollouts) * len(new),
                "dr_grpo": len(rollouts) * settings.max_completion_length,
                "bnpo": in_batch * len(batches),
            }.get(settings.loss_type, tokens)
            total = total + loss.sum() / divisor
    return total


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1, "temperature": 0.7},
        {"loss_type": "bnpo", "importance_sampling_mode": "token_truncate"},
        {"loss_type": "dr_grpo", "delta": 1.05, "epsilon_high": 0.28},
        {"loss_type": "cispo", "epsilon_high": 1.05, "importance_sampling_mode": "sequence_mask"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.003, "beta": 0.04},
        {"importance_sampling_mode": "token_mask", "importance_sampling_clip_max": 1.01},
        {"importance_sampling_mode": "sequence_truncate", "importance_sampling_clip_min": 0.9},
    ],
    ids=lambda values: "-".join(map(str, values.values())) or "dapo",
)
def test_loss_and_gradient_are_their_formulas(tiny_config, tiny_tokenizer, tmp_path, values) -> None:
    settings = settings_of(**values)
    model, reference = hf_model(tiny_config), hf_model(tiny_config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    trainer = trainer_of(settings, model, tiny_tokenizer, tmp_path, reference)
    rollouts, made = [], []
    prompts = torch.randint(4, tiny_config.vocab_size, (2, 3), generator=draw).tolist()
    for place, count in enumerate((3, 7, 1, 5)):
        reply = torch.randint(4, tiny_config.vocab_size, (count,), generator=draw).tolist()
        ids = prompts[place // 2] + reply
        example = Example(ids, [False] * 3 + [True] * count, "x[0]")
        noise = (0.05 * torch.randn(2, count, generator=draw) - 6.5).tolist()
        advantage = (1.5, -0.5, 2.5, 0.0)[place]  # the last one has a gradient only through the reference
        rollouts.append(Rollout(example, noise[0], advantage, old=noise[1]))
        figures = (sum((3, 7, 1, 5)), 4)
        completion = Completion(ids[3:], "", noise[0], True)
        prompt = Prompt(ids[:3], [False] * 3, "x[0]")
        made.append(trainer._rollout(prompt, completion, advantage, *figures))
        made[-1].old, rollouts[-1].weight = noise[1], made[-1].weight
    assert [rollout.counted for rollout in made] == [3, 7, 1, 5 if settings.beta else 0]
    trainer.current_gradient_accumulation_steps = 2
    batches = [[0, 1], [2, 3]]
    found = 0.0
    for batch in batches:
        row = trainer._row([made[i] for i in batch])
        loss = trainer.batch_loss(model, row) / 2
        loss.backward()
        found += loss.item()
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    exact, exact_reference = hf_model(tiny_config).double(), reference.double()
    expected = plain_loss(settings, exact, exact_reference, rollouts, batches)
    expected.backward()
    assert found == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(gradient[name].double(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    filler = trainer.batch_loss(model, trainer._row([Rollout(Example([], [], ""))]))
    filler.backward()
    assert filler.item() == 0.0


@pytest.mark.parametrize("heads", [4, 2])
def test_a_prompt_is_computed_once_for_its_replies(tiny_config, tiny_tokenizer, tmp_path, heads) -> None:
    """Replies of any lengths, one without loss, groups that are parted: the same log-probabilities and
    gradients as with a prompt of its own for each reply."""
    config = dataclasses.replace(tiny_config, num_key_value_heads=heads)
    trainer = trainer_of(settings_of(), hf_model(config), tiny_tokenizer, tmp_path)
    draw = torch.Generator().manual_seed(3)
    rollouts, prompts = [], [[5], [6, 7, 8, 9, 10, 11], [12, 13]]
    for number, counts in ((1, (4, 1, 9)), (0, (1,)), (2, (2, 0, 3)), (1, (5, 5))):
        for count in counts:
            reply = torch.randint(4, config.vocab_size, (count or 3,), generator=draw).tolist()
            mask = [False] * len(prompts[number]) + [count > 0] * len(reply)
            rollouts.append(Rollout(Example(prompts[number] + reply, mask, "x[0]")))
    found = []
    for rows in ([rollouts], [[rollout] for rollout in rollouts]):
        model, logprobs = hf_model(config), []
        parts = [row_of(row, 1) for row in rows]
        for part in parts:
            logprobs.append(trainer._log_probabilities(model, part))
        joined = torch.cat(logprobs)
        (joined * torch.linspace(-1, 1, len(joined))).sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((joined, gradients, torch.cat([part["targets"] for part in parts])))
        if len(rows) == 1:
            replies = sum(max(0, rollout.counted - 1) for rollout in rollouts)
            assert parts[0]["input_ids"].shape == (1, replies + 6 + 1 + 2 + 6)
            assert parts[0]["reply"].tolist()[-1] == len(rollouts) - 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_engine_draws_from_the_trainers_probabilities(tiny_config, tiny_tokenizer, tmp_path) -> None:
    """In float32, at another temperature than 1, and the weights are the trainer's own, not copies."""
    settings = settings_of(temperature=0.8, reward_funcs="brevity")
    model = hf_model(tiny_config)
    trainer = trainer_of(settings, model, tiny_tokenizer, tmp_path)
    trainer.rewards._scores = [lambda _, replies: [float(place) for place in range(len(replies))]]
    shared = plain_model(model)
    assert all(
        one.data_ptr() == other.data_ptr()
        for one, other in zip(shared.parameters(), model.parameters(), strict=True)
    )
    for _ in range(2):  # also after the weights have changed
        prompts = [Prompt([5, 6, 7 + n], [False] * 3, f"p[{n}]") for n in range(3) for _ in range(8)]
        rollouts = trainer._generate(prompts)
        trainer._rollouts = rollouts
        trainer.batch_loss(model, trainer._row(rollouts))
        for rollout in rollouts:
            assert rollout.old == pytest.approx(rollout.logprobs, abs=2e-5)
        assert trainer._largest < 2e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        trainer._largest = 0.0
        trainer._sums = dict.fromkeys(trainer._sums, 0.0)
        assert len({tuple(r.example.ids) for r in rollouts}) > 12, "replies to one prompt differ"


def test_a_process_gets_whole_groups_and_each_prompt_once() -> None:
    options = {"batch": 6, "accumulation": 2, "processes": 2, "generations": 4, "seed": 1}
    order = list(Groups(10, iterations=2, shuffled=True, **options))
    assert len(order) == len(Groups(10, iterations=2, shuffled=True, **options)) == 2 * 2 * 24
    assert Counter(order) == Counter({**dict.fromkeys(range(10), 8), FILLER: 16})
    assert order[:24] == order[24:48], "the second iteration trains on the same prompts"
    batches = [order[at : at + 6] for at in range(0, 24, 6)]
    for process in range(2):
        own = batches[process] + batches[process + 2]
        assert [len(set(own[at : at + 4])) for at in range(0, 12, 4)] == [1, 1, 1]
    ordered = list(Groups(3, iterations=1, shuffled=False, **{**options, "processes": 1}))
    assert ordered == [0] * 4 + [1] * 4 + [2] * 4


def test_advantages() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    scale = math.sqrt(1 / 3) + 1e-4
    assert advantages(rewards, "group")[0].tolist() == pytest.approx(
        [0.5 / scale, -0.5 / scale] * 1 + [-0.5 / scale, 0.5 / scale]
    )
    assert advantages(rewards, "group")[1].tolist() == [0.0] * 4
    assert advantages(rewards, "none")[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert advantages(rewards, "batch")[0, 0].item() == pytest.approx(0.5 / (rewards.std().item() + 1e-4))


RULES = {
    "check": ({"check": {"all": [["blue"]], "shorter": 20}}, "blue", "It is red.", {"check": {"al": 1}}),
    "number": ({"answer": "so #### 1,200"}, "That makes 1200.0", "That makes 120", {"answer": "none"}),
    "exact": ({"answer": 7}, " 7\n", "7.", {"answer": ""}),
    "format": ({}, "<a>x</a>", "x", None),
    "program": ({"test": "assert f(2) == 4"}, "def f(x): return x * x", "def f(x): return x", {"test": 1}),
    "language": ({"language": "fr"}, "bonjour, comment puis je vous aider", "hello", {"language": "xx"}),
    "finished": ({}, "done", None, None),
    "brevity": ({}, "", "a reply of words", None),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    options = {"reward_pattern": "<a>.*</a>"} if name == "format" else {}
    settings = settings_of(reward_funcs=name, allow_code=True, **options)
    columns, good, bad, unusable = RULES[name]
    rule = rules(settings)[name]
    assert rules_of(settings)[0].missing({"answer": None, **columns}) == ""
    assert unusable is None or rule.missing(unusable)
    right = rule.score(Completion([1] * len(good), good, [], True), columns)
    assert right == 1.0
    wrong = rule.score(Completion([1] * 9, bad or good, [], bad is not None), columns)
    assert wrong < 0.5


def test_every_rule_is_tested_and_all_code_needs_permission() -> None:
    known = rules(settings_of(allow_code=True))
    assert set(known) == set(RULES)
    for name in ("program", "json:loads"):
        with pytest.raises(Exception, match="--allow_code"):
            settings_of(reward_funcs=name)
    missing = rules(settings_of())["check"].missing({"check": {"program": "assert f(1)"}})
    assert "--allow_code" in missing


def test_unusable_columns_and_replies_that_are_right() -> None:
    known = rules(settings_of(allow_code=True))
    assert known["language"].missing({"language": ["fr"]})
    assert known["check"].missing({"check": {"language": ["fr"]}})
    assert known["program"].missing({"test": "assert ("})
    branches = "".join(f"    if x == {n}:\n        return {n * n}\n    pass\n" for n in range(5))
    code = Completion([1], f"def f(x):\n{branches}", [], True)  # with equal lines, as programs have
    assert known["program"].score(code, {"test": "assert f(3) == 9"}) == 1.0
    assert known["number"].score(Completion([1], "It is 20-10", [], True), {"answer": 10}) == 1.0


def test_a_module_that_cannot_be_imported(grpo, flags, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["finetune", *flags({**grpo, "reward_funcs": "broken:f", "allow_code": ""})]) == 2
    assert "broken cannot be imported (SyntaxError" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def questions(folder: Path) -> Path:
    rows = [{"question": f"say hello {i}", "answer": str(i), "check": {"shorter": 6}} for i in range(24)]
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def grpo(document: dict[str, str], questions: Path) -> dict[str, str]:
    kept = ("model_name_or_path", "do_train", "dataset_dir", "output_dir", "plot_loss", "logging_steps")
    return {
        **{key: document[key] for key in kept},
        "stage": "grpo",
        "dataset": "questions.json",
        "finetuning_type": "full",
        "reward_funcs": "brevity",
        "max_completion_length": "12",
        "num_generations": "4",
        "per_device_train_batch_size": "8",
        "gradient_accumulation_steps": "2",
        "learning_rate": "1e-2",
        "lr_scheduler_type": "constant",
        "max_steps": "12",
        "save_steps": "5",
    }


def rewards_of(out: Path) -> list[float]:
    return [record["reward"] for record in read_metrics(out / "metrics.jsonl") if "reward" in record]


def test_a_model_learns_a_rule_and_goes_on_exactly(grpo, flags, tmp_path, monkeypatch) -> None:
    """Two steps on the same replies, a KL term, a function of the user's own; stopped between the two."""
    (tmp_path / "own.py").write_text(
        "def low(completions, completion_ids, answer, **rest):\n"
        "    assert len(answer) == len(completions)\n"
        "    return [sum(i < 350 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    grpo |= {
        "reward_funcs": "finished,own:low",
        "reward_weights": "0.1,1",
        "beta": "0.01",
        "num_iterations": "2",
    }
    grpo |= {"val_size": "4", "do_eval": "", "allow_code": ""}
    assert main(["finetune", *flags(grpo)]) == 0
    out = tmp_path / "out"
    rewards = rewards_of(out)
    assert len(rewards) == 12
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1, rewards
    records = read_metrics(out / "metrics.jsonl")
    for record in records[:12]:
        assert {"kl", "clip_ratio", "completion_length", "sampling_ratio"} <= set(record)
        assert ("rollout_tokens_per_second" in record) == (record["step"] % 2 == 0)
        assert record["logprob_difference_max"] < 1e-4
        assert {"reward_std", "reward/finished", "reward/own:low", "truncated_share"} <= set(record)
    assert records[0]["kl"] < 1e-9 < records[5]["kl"]
    assert (out / "loss.png").exists()
    card = (out / "README.md").read_text()
    assert "eval_reward" in card or "reward" in card
    # The same run, from checkpoint 5, between two steps on the same replies.
    again = tmp_path / "again"
    (out / "checkpoint-5").rename(tmp_path / "checkpoint-5")
    words = flags(
        {**grpo, "output_dir": str(again), "resume_from_checkpoint": str(tmp_path / "checkpoint-5")}
    )
    assert main(["finetune", *words]) == 0
    losses = [[r["loss"] for r in read_metrics(p / "metrics.jsonl") if "loss" in r] for p in (out, again)]
    assert losses[1] == losses[0][5:]


def test_lora_and_truncated_replies_without_loss(grpo, flags, tmp_path) -> None:
    grpo |= {
        "finetuning_type": "lora",
        "mask_truncated_completions": "",
        "reward_funcs": "check",
        "beta": "0.1",
    }
    grpo |= {"max_steps": "3", "loss_type": "grpo"}
    assert main(["finetune", *flags(grpo)]) == 0
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(record.get("logprob_difference_max", 0.0) < 1e-4 for record in records if "loss" in record)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": "numbr"}, "did you mean 'number'"),
        ({"reward_funcs": "program", "allow_code": ""}, "no Python in 'test'"),
        ({"reward_funcs": "nowhere:f", "allow_code": ""}, "must be on PYTHONPATH"),
        ({"reward_funcs": ":f", "allow_code": ""}, "must be on PYTHONPATH"),
        ({"reward_weights": "nan"}, "'nan' is not a finite number"),
        ({"repetition_penalty": "0"}, "repetition_penalty: 0.0 is out of range"),
        ({"reward_funcs": "format", "reward_pattern": "("}, "not a regular expression"),
        ({"cutoff_len": "12"}, "leaves no room for a prompt"),
        ({"packing": "true"}, "cannot be combined with packing"),
        ({"streaming": ""}, "stage sft or pt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(grpo, flags, capsys, changes, message) -> None:
    assert main(["finetune", *flags({**grpo, **changes})]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_recipe_cannot_permit_code(grpo, tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**BASE, "reward_funcs": "program", "allow_code": True}))
    assert main(["finetune", str(recipe)]) == 2
    assert "on the command line" in capsys.readouterr().err

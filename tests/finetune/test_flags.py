"""The flags: every one of XVERSE-7B's README, LLaMA-Factory's meanings, refusals by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from xverse.cli import main, verb_parser
from xverse.config import UserError, read_yaml
from xverse.finetune.encode import Data
from xverse.finetune.launch import deepspeed_file, training_arguments
from xverse.finetune.resume import _compare, run_state
from xverse.finetune.settings import _ONLY_WITH, OWN, Settings, read_settings, training_values

# The command of XVERSE-7B's README, word for word.
COMMAND = r"""
    --stage sft \
    --model_name_or_path model_path \
    --do_train \
    --dataset alpaca_gpt4_en \
    --template default \
    --finetuning_type full \
    --output_dir output_model_path \
    --overwrite_cache \
    --per_device_train_batch_size 4 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --preprocessing_num_workers 16 \
    --lr_scheduler_type cosine \
    --logging_steps 10 \
    --save_steps 200 \
    --eval_steps 200 \
    --learning_rate 2e-5 \
    --max_grad_norm 0.5 \
    --num_train_epochs 2.0 \
    --evaluation_strategy steps \
    --load_best_model_at_end \
    --plot_loss \
    --bf16 \
    --padding_side right \
    --deepspeed deepspeed.json
"""
MINIMUM = {"model_name_or_path": "nano", "dataset": "x", "do_train": True, "output_dir": "out"}


def settings(**values: object) -> Settings:
    return read_settings({**MINIMUM, **values}, "test")


def test_the_documents_command_is_accepted_flag_by_flag() -> None:
    words = COMMAND.replace("\\\n", " ").split()
    given = vars(verb_parser("finetune").parse_args(["--local_rank=0", *words]))
    named = {word[2:] for word in words if word.startswith("--")}
    assert named <= {name for name, value in given.items() if value is not None}
    values = {key: value for key, value in given.items() if key not in ("recipe", "overrides")}
    settings = read_settings(values, "document")
    passed = training_values(settings)
    assert passed["eval_strategy"] == "steps"
    assert (passed["save_steps"], passed["eval_steps"], passed["max_grad_norm"]) == (200, 200, 0.5)
    assert passed["load_best_model_at_end"]
    assert passed["bf16"]
    assert settings.held_out(52_000) == 520, "1 % where evaluation is asked for without a validation set"


def test_a_bare_deepspeed_json_is_the_documents() -> None:
    pytest.importorskip("deepspeed")
    values = json.loads(deepspeed_file("deepspeed.json").read_text())
    assert values.pop("zero_optimization") == {
        "stage": 2,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    assert values == {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }


def test_what_goes_to_transformers_is_known_there() -> None:
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(Settings)}
    assert ours - OWN <= theirs
    assert {"learning_rate", "deepspeed", "fsdp", "seed"} <= ours - OWN


def test_values_reach_transformers(tmp_path) -> None:
    given = settings(
        output_dir=str(tmp_path),
        eval_strategy="epoch",
        load_best_model_at_end=True,
        warmup_ratio=0.1,
        bf16=True,
    )
    args = training_arguments(given)
    assert args.save_strategy == args.eval_strategy == "epoch"
    assert args.warmup_steps == 0.1
    assert args.seed == 42
    assert not args.remove_unused_columns


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "llama9"}, "template 'llama9' is not known"),
        ({"do_train": False}, "nothing to do"),
        ({"dataset": None}, "needs a dataset"),
        ({"deepspeed": "a.json", "fsdp": "full_shard"}, "one of them"),
        ({"eval_strategy": "steps", "evaluation_strategy": "epoch"}, "one setting"),
        ({"use_liger_kernel": True, "enable_liger_kernel": False}, "one setting"),
        ({"save_dtype": "float32"}, "needs finetuning_type full"),
        ({"lora_rnak": 3, "lerning_rate": 1}, "lerning_rate.*learning_rate"),
        ({"load_best_model_at_end": True}, "needs evaluation"),
        ({"val_size": 1.5}, "neither a share"),
        ({"warmup_ratio": 1}, "warmup_ratio 1 is not a share below 1; warmup_steps counts steps"),
        ({"warmup_ratio": 1.5}, "warmup_ratio 1.5 is not a share"),
        ({"val_size": 0.1, "eval_dataset": "y"}, "mutually exclusive"),
        ({"train_on_prompt": True, "mask_history": True}, "contradict"),
        ({"bf16": True, "fp16": True}, "contradict"),
        ({"lora_rnak": 3}, "did you mean 'lora_rank'"),
        ({"stage": "ppo"}, "PPO is not implemented; use stage grpo"),
        ({"stage": "pretrain"}, "not one of sft, pt, dpo, kto"),
        ({"ref_model": "nano"}, "needs stage dpo or kto"),
        ({"loraplus_lr_ratio": 16, "finetuning_type": "full"}, "needs finetuning_type lora"),
        ({"use_muon": True}, "cannot be combined with finetuning_type lora"),
        ({"use_muon": True, "finetuning_type": "full", "optim": "sgd"}, "cannot be combined with optim"),
        ({"disable_shuffling": True, "group_by_length": True}, "contradict"),
        ({"dpo_label_smoothing": 0.1}, "needs stage dpo"),
        ({"stage": "dpo", "dpo_label_smoothing": 0.5}, "out of range"),
        ({"replay": {"data": "x", "share": 0.1}, "stage": "dpo"}, "replay needs stage sft or pt"),
        ({"replay": {"data": "x", "share": 0.1}, "streaming": True, "max_steps": 4}, "with streaming"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"lr_scheduler_kwargs": "{"}, "lr_scheduler_kwargs: invalid JSON"),
        ({"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs: expected a JSON object"),
        ({"fsdp_config": "{"}, "fsdp_config: invalid JSON"),
        ({"fsdp_config": "missing.json"}, "missing.json: no such file"),
        ({"optim_args": "x"}, "optim_args: 'x' is not name=value"),
        ({"generation": {"top_k": "x"}, "finetuning_type": "full"}, "top_k: 'x' is out of range"),
        ({"generation": {"temperature": -1}, "finetuning_type": "full"}, "temperature: -1 is out of range"),
    ],
)
def test_contradictions_are_one_line(values, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        settings(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("needed", "names"), [(key, names) for key, (names, _) in _ONLY_WITH.items()])
def test_settings_that_a_run_does_not_use_are_reported(needed, names, capsys) -> None:
    other = {"bool": True, "str": "{}", "int": 5, "float": 0.25}
    hints = {
        item.name: item.type.removeprefix("Annotated[").split()[0] for item in dataclasses.fields(Settings)
    }
    values = {name: other[hints[name].rstrip(",")] for name in names.split() if name != "pref_loss"}
    values |= {"pref_loss": "ipo"} if "pref_loss" in names else {}
    method = "lora" if "freeze" in needed else "full"
    read_settings({**MINIMUM, "finetuning_type": method, **values}, "r.yaml", quiet=False)
    assert f"{', '.join(values)} (only used with {needed})" in " ".join(capsys.readouterr().err.split())
    read_settings({**MINIMUM, "finetuning_type": method}, "r.yaml", quiet=False)
    assert not capsys.readouterr().err


def test_state_files_of_older_versions_are_understood(tmp_path) -> None:
    chosen = settings(eval_strategy="steps", val_size=4.0, dataset="a,b")
    state = run_state(chosen, Data())
    file = tmp_path / "finetune.json"
    older = {**state["settings"], "evaluation_strategy": "steps", "enable_liger_kernel": False}
    older |= {"neat_packing": False, "pref_beta": 0.1, "lora_target": "all"}
    del older["eval_strategy"]
    file.write_text(json.dumps({**state, "settings": older}))
    _compare(file, state)
    with pytest.raises(UserError, match=r"learning_rate \(None → 0.1\)"):
        _compare(file, run_state(settings(**older, learning_rate=0.1), Data()))
    with pytest.raises(UserError, match="other data"):
        _compare(file, {**state, "train": "another"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rnak", "8"], "did you mean '--lora_rank'"),
        (["--stage", "stf"], "did you mean 'sft'"),
        (["--bf16", "maybe"], "neither true nor false"),
        ([], "give a recipe or flags"),
        (["--do_train"], "missing key"),
    ],
)
def test_the_command_line_refuses_by_name(words, message, capsys) -> None:
    try:
        code = main(["finetune", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_trackers_are_known() -> None:
    with pytest.raises(
        UserError, match="unknown tracker in report_to 'tensorbord'; did you mean 'tensorboard'"
    ):
        training_arguments(settings(report_to="tensorbord"))
    assert training_arguments(settings(report_to="none", use_cpu=True)).report_to == []


def test_yaml_has_the_same_names(tmp_path, capsys) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump({**MINIMUM, "output_dir": str(tmp_path / "o"), "dataset": ["a", "b"]}))
    assert main(["finetune", str(file), "model_name_or_path=nowhere"]) == 2
    assert "no model 'nowhere'" in capsys.readouterr().err
    assert main(["finetune", str(file), "lora_rnak=4"]) == 2
    assert "did you mean 'lora_rank'" in capsys.readouterr().err


def test_a_deepspeed_file_that_is_not_there(tmp_path) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match="no such file"):
        deepspeed_file("ds_z3.json")
    own = tmp_path / "deepspeed.json"
    own.write_text("{}")
    assert deepspeed_file(str(own)) == own
    for text, message in (
        ('{"tensor_parallel": {"autotp_size": 4}}', "AutoTP"),
        ("{", "Expecting"),
        ("[]", "object"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=message):
            deepspeed_file(str(own))


@pytest.mark.parametrize("name", ["sft/full.yaml", "sft/lora.yaml", "dpo/lora.yaml", "nano/sft.yaml"])
def test_shipped_recipes_are_well_formed(name) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / name
    assert read_settings(read_yaml(recipe), name).learning_rate


def test_held_out_examples_leave_some_to_train_on() -> None:
    assert settings(val_size=7.0).held_out(8) == 7
    assert settings(val_size=0.99).held_out(8) == 7
    for count in (1, 7):
        with pytest.raises(UserError, match=f"val_size 7 leaves none of {count} examples to train on"):
            settings(val_size=7.0).held_out(count)

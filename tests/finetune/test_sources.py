"""Datasets by name, in all formats; what is cut, skipped, held out; the loss mask."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xverse.cli import main
from xverse.config import UserError, build
from xverse.data.dialogues.conversations import DatasetInfo, to_dialogue, to_preference
from xverse.data.dialogues.instructions import Skip
from xverse.finetune.encode import encode_within, load_data
from xverse.finetune.settings import read_settings
from xverse.finetune.sources import find_sources, packaged, read_source
from xverse.tokenizer import encode_chat, encode_dialogue

CALL = {"name": "area", "arguments": {"side": 3}}


def settings(folder: Path, **values: Any) -> Any:
    values = {"dataset": "alpaca_gpt4_en", "dataset_dir": str(folder), "do_train": True, **values}
    return read_settings({"model_name_or_path": "x", "output_dir": "y", **values}, "test")


def info(**values: Any) -> DatasetInfo:
    return build(DatasetInfo, values, "test")


def roles(item: dict[str, Any], **values: Any) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in to_dialogue(item, info(**values)).messages]


def test_alpaca_with_system_and_history() -> None:
    item = {
        "instruction": "and",
        "input": "then",
        "output": "last",
        "system": "be kind",
        "history": [["q1", "a1"], ["q2", "a2"]],
    }
    assert roles(item, columns={"system": "system", "history": "history"}) == [
        ("system", "be kind"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "and\nthen"),
        ("assistant", "last"),
    ]
    renamed = {"question": "q", "answer": "a"}
    assert roles(renamed, columns={"prompt": "question", "response": "answer"}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_sharegpt_with_tools_and_openai_messages_say_the_same() -> None:
    sharegpt = {
        "tools": json.dumps([{"name": "area", "description": "d", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "how big?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "9"},
            {"from": "gpt", "value": "nine"},
        ],
    }
    openai = {
        "tools": [{"type": "function", "function": {"name": "area", "description": "d", "parameters": {}}}],
        "messages": [
            {"role": "user", "content": "how big?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "area", "arguments": json.dumps(CALL["arguments"])}}],
            },
            {"role": "tool", "content": "9"},
            {"role": "assistant", "content": "nine"},
        ],
    }
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
    }
    first = roles(sharegpt, formatting="sharegpt", columns={"tools": "tools"})
    columns = {"tools": "tools", "messages": "messages"}
    assert first == roles(openai, formatting="sharegpt", columns=columns, tags=tags)
    assert [role for role, _ in first] == ["system", "user", "assistant", "exec", "assistant"]
    assert first[2][1] == f"<tool_call>{json.dumps(CALL)}</tool_call>"
    assert '"name": "area"' in first[0][1]


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "roles out of order"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "empty text"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "unknown role"),
        ({"conversations": [{"from": "function_call", "value": "no json"}]}, "ill-formed tool call"),
        ({"conversations": "text"}, "ill-formed turn"),
    ],
)
def test_unusable_items_say_why(item, why) -> None:
    with pytest.raises(Skip, match=why):
        to_dialogue(item, info(formatting="sharegpt"))


def test_preferences_of_both_formats() -> None:
    item = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    pair = to_preference(item, info(formatting="sharegpt", ranking=True))
    assert (pair.messages, pair.chosen, pair.rejected) == ([{"role": "user", "content": "q"}], "good", "bad")
    plain = to_preference({"instruction": "q", "chosen": "good", "rejected": "bad"}, info(ranking=True))
    assert plain == pair


def test_names_are_entries_files_folders_and_homes(folder) -> None:
    found = find_sources("alpaca_gpt4_en, turns.json,belle_1m,some/where", folder)
    assert [source.path and source.path.name for source in found] == ["small.json", "turns.json", None, None]
    assert found[2].info.hf_hub_url == "BelleGroup/train_1M_CN"
    assert found[3].info.hf_hub_url == "some/where"
    (home,) = find_sources("alpaca_gpt4_en", folder.parent)  # no dataset_info.json of its own
    assert home.info.hf_hub_url == "llamafactory/alpaca_gpt4_en"
    (guessed,) = find_sources("turns.json", folder)
    assert len(list(read_source(guessed, "sft", Counter()))) == 40


def test_every_packaged_entry_is_well_formed() -> None:
    for name, values in packaged().items():
        assert build(DatasetInfo, values, name).hf_hub_url


def test_unknown_names_and_columns_list_what_exists(folder) -> None:
    with pytest.raises(UserError, match=r"did you mean 'alpaca_gpt4_en'.*other.*codealpaca"):
        find_sources("alpaca_gtp4_en", folder)
    (folder / "dataset_info.json").write_text(
        json.dumps({"a": {"file_name": "small.json", "columns": {"prompt": "question"}}, "b": {"colums": {}}})
    )
    with pytest.raises(UserError, match=r"no column 'question' \(there are: instruction, input, output\)"):
        list(read_source(find_sources("a", folder)[0], "sft", Counter()))
    with pytest.raises(UserError, match="did you mean 'columns'"):
        find_sources("b", folder)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="ill-formed JSON"):
        find_sources("a", folder)
    with pytest.raises(UserError, match="cannot be fetched"):
        list(read_source(find_sources("some/where", folder.parent)[0], "sft", Counter()))


def test_csv_parquet_and_text(tmp_path, tiny_tokenizer) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.DataFrame({"instruction": ["q1", "q2"], "output": ["a1", "a2"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.txt").write_text("a first line\n\na second one\n")
    both = load_data(settings(tmp_path, dataset="t.csv,t.parquet"), tiny_tokenizer, 64)
    assert [e.ids for e in both.train[:2]] == [e.ids for e in both.train[2:]]
    text = load_data(settings(tmp_path, dataset="t.txt", stage="pt"), tiny_tokenizer, 5)
    assert all(len(e.ids) <= 5 for e in text.train)
    ends = [e for e in text.train if e.ids[-1] == tiny_tokenizer.eos_id]
    assert len(ends) == 2
    assert ends[0].mask[0] is False
    assert all(ends[0].mask[1:])


def test_held_out_by_seed_and_said(folder, tiny_tokenizer, capsys) -> None:
    one = load_data(settings(folder, eval_strategy="steps"), tiny_tokenizer, 64)
    assert (len(one.train), len(one.valid)) == (39, 1)
    assert "1 of 40 examples held out (no validation set named)" in " ".join(capsys.readouterr().err.split())
    ten = load_data(settings(folder, val_size=10.0), tiny_tokenizer, 64)
    again = load_data(settings(folder, val_size=0.25), tiny_tokenizer, 64)
    assert ten.valid == again.valid
    other = load_data(settings(folder, val_size=10.0, seed=1), tiny_tokenizer, 64)
    assert other.valid != ten.valid
    names = [e.name for e in (*ten.train, *ten.valid)]
    assert len(set(names)) == 40
    named = load_data(settings(folder, eval_dataset="other", max_samples=7), tiny_tokenizer, 64)
    assert (len(named.train), len(named.valid)) == (7, 7)


MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "a second and longer question"},
    {"role": "assistant", "content": "second"},
]


def test_loss_begins_where_chat_would_and_ends_with_the_end_marker(tiny_tokenizer) -> None:
    ids, mask, cut = encode_within(tiny_tokenizer, MESSAGES, 500)
    assert (ids, mask) == encode_dialogue(tiny_tokenizer, MESSAGES)
    assert not cut
    prompt = encode_chat(tiny_tokenizer, MESSAGES[:-1], max_new_tokens=64).ids
    assert ids[: len(prompt)] == prompt
    assert tiny_tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "first answersecond"
    assert all(mask[len(prompt) :])
    assert ids[-1] == tiny_tokenizer.eos_id


def test_too_long_gives_way_on_the_prompts_side(tiny_tokenizer) -> None:
    whole = len(encode_dialogue(tiny_tokenizer, MESSAGES)[0])
    shorter = encode_dialogue(tiny_tokenizer, [MESSAGES[0], *MESSAGES[3:]])
    ids, mask, cut = encode_within(tiny_tokenizer, MESSAGES, whole - 1)
    assert ((ids, mask), cut) == (shorter, "lost their oldest rounds")
    answer = [*tiny_tokenizer.encode("second"), tiny_tokenizer.eos_id]
    for length in range(len(shorter[0]) - 1, 24, -1):
        ids, mask, cut = encode_within(tiny_tokenizer, MESSAGES, length)
        assert len(ids) <= length
        assert [i for i, m in zip(ids, mask, strict=True) if m] == answer
        assert "question cut" in cut
    long = [MESSAGES[1], {"role": "assistant", "content": "many words " * 50}]
    ids, mask, cut = encode_within(tiny_tokenizer, long, 30)
    assert (len(ids), cut) == (30, "had question and answer cut")
    assert ids[-1] != tiny_tokenizer.eos_id, "a cut answer has not ended"


def test_masks_on_request(folder, tiny_tokenizer) -> None:
    rows = [{"conversations": [{"from": r, "value": v} for r, v in
             (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]}]  # fmt: skip
    (folder / "many.json").write_text(json.dumps(rows))
    (all_turns,) = load_data(settings(folder, dataset="many.json"), tiny_tokenizer, 64).train
    (last,) = load_data(settings(folder, dataset="many.json", mask_history=True), tiny_tokenizer, 64).train
    (whole,) = load_data(
        settings(folder, dataset="many.json", train_on_prompt=True), tiny_tokenizer, 64
    ).train
    assert all_turns.ids == last.ids == whole.ids
    assert tiny_tokenizer.decode([i for i, m in zip(last.ids, last.mask, strict=True) if m]) == "d"
    assert sum(whole.mask) == len(whole.ids) - 1
    assert sum(last.mask) < sum(all_turns.mask)


def test_data_show_prints_one_example(folder, base, capsys) -> None:
    words = [
        "data",
        "show",
        "--dataset",
        "alpaca_gpt4_en",
        "--dataset-dir",
        str(folder),
        "--model",
        str(base),
    ]
    assert main([*words, "--index", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Human: say hello 3\n\nAssistant: good morning and again" in shown
    assert "with loss (bold green)" in shown
    assert main([*words, "--index", "40"]) == 2


def test_real_datasets_are_read(test_data, tiny_tokenizer) -> None:
    folder = test_data / "sft" / "llama-factory"
    if not folder.is_dir():
        pytest.skip("no LLaMA-Factory demos here")
    names = "alpaca_en_demo,alpaca_zh_demo,glaive_toolcall_en_demo,glaive_toolcall_zh_demo"
    data = load_data(settings(folder, dataset=names, max_samples=50), tiny_tokenizer, 4096)
    assert len(data.train) == 200
    text = load_data(
        settings(folder, dataset="wiki_demo,c4_demo", stage="pt", max_samples=5), tiny_tokenizer, 512
    )
    assert text.train

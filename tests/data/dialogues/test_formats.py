"""Every format of fine-tuning data as messages; what is unusable, and why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xverse.config import UserError, build
from xverse.data.dialogues.formats import (
    DatasetInfo,
    Skip,
    check_columns,
    fill_placeholders,
    guess,
    is_undesirable,
    to_dialogue,
    to_preference,
)
from xverse.tokenizer import encode_dialogue

TURNS = [("user", "Hi"), ("assistant", "Hello!")]
CALL = {"name": "area", "arguments": {"side": 3}}


def info(**values: Any) -> DatasetInfo:
    return build(DatasetInfo, values, "test")


def roles(item: dict[str, Any], description: DatasetInfo) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in to_dialogue(item, description)]


@pytest.mark.parametrize(
    ("item", "messages"),
    [
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, TURNS),
        ({"instruction": "Hi", "response": "Hello!", "id": 4}, TURNS),
        (
            {
                "instruction": "Add",
                "input": "1 2",
                "output": "3",
                "system": "Be brief",
                "history": [["Hi", "Hello!"]],
            },
            [("system", "Be brief"), *TURNS, ("user", "Add\n1 2"), ("assistant", "3")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
                "tools": "[]",
            },
            TURNS,
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    *({"role": r, "content": c} for r, c in TURNS),
                ]
            },
            [("system", "S"), *TURNS],
        ),
        ({"messages": [{"role": r, "content": [{"type": "text", "value": c}]} for r, c in TURNS]}, TURNS),
    ],
)
def test_formats_are_recognised_by_their_keys(item: Any, messages: Any, tiny_tokenizer: Any) -> None:
    assert roles(item, guess(item, "test")) == messages
    encode_dialogue(tiny_tokenizer, [{"role": role, "content": content} for role, content in messages])


def test_renamed_columns() -> None:
    renamed = {"question": "q", "answer": "a"}
    columns = {"prompt": "question", "response": "answer"}
    assert roles(renamed, info(columns=columns)) == [("user", "q"), ("assistant", "a")]


def test_sharegpt_with_tools_and_openai_messages_are_the_same() -> None:
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
    messages = roles(sharegpt, guess(sharegpt, "test"))
    assert messages == roles(openai, guess(openai, "test"))
    assert messages == roles(sharegpt, info(formatting="sharegpt", columns={"tools": "tools"}))
    assert [role for role, _ in messages] == ["system", "user", "assistant", "exec", "assistant"]
    assert messages[2][1] == f"<tool_call>{json.dumps(CALL)}</tool_call>"
    assert '"name": "area"' in messages[0][1]


ALPACA, SHAREGPT = info(), info(formatting="sharegpt")


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"instruction": "Hi", "output": ""}, "empty text"),
        ({"instruction": "Hi"}, "not text"),
        ({"instruction": "Hi", "output": "x", "history": ["a"]}, "ill-formed history"),
        ({"instruction": "Hi", "output": "\ud83d"}, "invalid Unicode"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "roles out of order"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "roles out of order"),
        ({"conversations": []}, "roles out of order"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "unknown role"),
        ({"conversations": "Hi"}, "ill-formed turn"),
        ({"conversations": [{"from": "human", "value": "Hi"}], "tools": "[{}]"}, "ill-formed tools"),
        ({"conversations": [{"from": "function_call", "value": "no json"}]}, "ill-formed tool call"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "empty text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss_weight": 0.0}]},
            "reply with a loss weight",
        ),
    ],
)
def test_unusable_items_are_skipped_with_a_reason(item: Any, reason: str) -> None:
    with pytest.raises(Skip, match=reason):
        to_dialogue(item, guess(item, "test"))


def test_items_that_are_not_objects_are_skipped() -> None:
    for description in (ALPACA, SHAREGPT):
        with pytest.raises(Skip, match="not an object"):
            to_dialogue(["a list"], description)


@pytest.mark.parametrize("item", [{"text": "plain"}, {"id": 1}])
def test_other_formats_are_refused_with_their_keys(item: Any) -> None:
    with pytest.raises(UserError, match=r"no column 'output'|unknown format \(keys: id\)"):
        check_columns(item, guess(item, "test"), "sft", "test")


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
    first_versions = {"instruction": "q", "output": ["good", "bad"]}  # LLaMA-Factory's of 2023
    check_columns(first_versions, info(ranking=True), "dpo", "test")
    assert to_preference(first_versions, info(ranking=True)) == pair
    for output in ("good", ["good"], ["a", "b", "c"]):
        with pytest.raises(UserError, match="no column 'chosen'"):
            check_columns({"instruction": "q", "output": output}, info(ranking=True), "rm", "test")
    with pytest.raises(UserError, match="need stage dpo"):
        check_columns(item, guess(item, "test"), "sft", "test")
    with pytest.raises(UserError, match="ranking"):
        check_columns(item, info(formatting="sharegpt"), "dpo", "test")


def test_kto_labels() -> None:
    item = {"messages": [{"role": role, "content": text} for role, text in TURNS], "label": False}
    description = guess(item, "test")
    assert description.columns.kto_tag == "label"
    assert is_undesirable(item, description)
    assert not is_undesirable({**item, "label": True}, description)
    assert roles(item, description) == TURNS


def test_placeholders_are_filled_and_the_others_reported() -> None:
    unfilled: set[str] = set()
    text = fill_placeholders("I am {{name}} by {{ author }}, {not} {{ this one }}", {"name": "N"}, unfilled)
    assert text == "I am N by {{ author }}, {not} {{ this one }}"
    assert unfilled == {"author"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"script_url": "x.py"}, "script_url is not supported"),
        ({"cloud_file_name": "x"}, "cloud_file_name is not supported"),
        ({"om_hub_url": "a/b"}, "om_hub_url alone"),
        ({"file_name": "a.json", "subset": "en"}, "subset needs hf_hub_url"),
        ({"file_name": "a.json", "folder": "en"}, "folder needs hf_hub_url"),
        ({"file_name": "a.json", "split": "test"}, "split needs hf_hub_url"),
        ({"hf_hub_url": "a/b", "file_sha1": "0"}, "file_sha1 needs file_name"),
        ({"file_name": "a.json", "num_samples": 0}, "num_samples must be positive, not 0"),
        ({"hf_hub_url": "a/b", "num_samples": -1}, "num_samples must be positive, not -1"),
    ],
)
def test_keys_of_an_entry_without_effect_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        info(**values)

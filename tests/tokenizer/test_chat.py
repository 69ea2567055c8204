"""The chat encoding and the template, and where the two differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xverse.config import UserError
from xverse.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    Tokenizer,
    encode_chat,
    encode_dialogue,
    input_limit,
)
from xverse.tokenizer.chat import PREFIXES, SUFFIXES
from xverse.tokenizer.template import render

EOS = 3


def render_template(messages: Any, add_generation_prompt: bool = True, template: str = CHAT_TEMPLATE) -> str:
    tokens = {"bos_token": SPECIAL_TOKENS[2], "eos_token": SPECIAL_TOKENS[3]}
    return render(template, messages, add_generation_prompt=add_generation_prompt, **tokens)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATION = [user("Hello"), assistant("Hi! 你好"), user("who are you?")]


def test_vector(tiny_tokenizer: Tokenizer) -> None:
    encode = tiny_tokenizer.encode
    expected = [
        *encode("Human: "),
        *encode("Hello\n\n"),
        *encode("Assistant: "),
        *encode("Hi! 你好"),
        EOS,
        *encode("Human: "),
        *encode("who are you?\n\n"),
        *encode("Assistant: "),
    ]
    prompt = encode_chat(tiny_tokenizer, CONVERSATION, max_new_tokens=2048)
    assert prompt.ids == expected
    assert (prompt.dropped_rounds, prompt.cut_tokens) == (0, 0)
    assert tiny_tokenizer.decode(prompt.ids, skip_special=False) == (
        "Human: Hello\n\nAssistant: Hi! 你好<|endoftext|>Human: who are you?\n\nAssistant: "
    )


def test_system_and_exec(tiny_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("2+2?"),
        assistant("calc"),
        {"role": "exec", "content": "4"},
    ]
    prompt = encode_chat(tiny_tokenizer, messages, max_new_tokens=100)
    assert tiny_tokenizer.decode(prompt.ids, skip_special=False) == (
        "Human: Be brief.\nHuman: 2+2?\n\nAssistant: calc<|endoftext|>Exec: 4\n\nAssistant: "
    )


def test_user_text_cannot_end_a_turn(tiny_tokenizer: Tokenizer) -> None:
    prompt = encode_chat(tiny_tokenizer, [user("x<|endoftext|>y<pad>")], max_new_tokens=100)
    assert not set(prompt.ids) & tiny_tokenizer.special_ids


@pytest.mark.parametrize(
    ("new_tokens", "positions", "truncation", "limit"),
    [
        (2048, 8192, 6144, 6144),
        (3000, 8192, 6144, 5192),
        (8000, 8192, 6144, 4096),
        (100, 512, 6144, 412),
        (500, 512, 6144, 256),
        (100, 512, 300, 300),
    ],
)
def test_input_limit(new_tokens: int, positions: int, truncation: int, limit: int) -> None:
    assert input_limit(new_tokens, positions, truncation) == limit


def test_oldest_whole_rounds_are_dropped_first(tiny_tokenizer: Tokenizer) -> None:
    turns: list[dict[str, str]] = []
    for number in range(6):
        turns += [user(f"question {number} " + "word " * 10), assistant(f"answer {number}")]
    turns.append(user("last"))
    whole = encode_chat(tiny_tokenizer, turns, max_new_tokens=1).ids
    for limit in range(len(whole), 40, -7):
        prompt = encode_chat(tiny_tokenizer, turns, max_new_tokens=1, truncation=limit)
        kept = turns[2 * prompt.dropped_rounds :]
        assert len(prompt.ids) <= limit
        assert prompt.ids == encode_chat(tiny_tokenizer, kept, max_new_tokens=1).ids
        assert prompt.cut_tokens == 0
        if prompt.dropped_rounds:  # one round more would not have fitted
            more = turns[2 * prompt.dropped_rounds - 2 :]
            assert len(encode_chat(tiny_tokenizer, more, max_new_tokens=1).ids) > limit
    assert prompt.dropped_rounds > 2


def test_last_turn_is_cut_on_the_right(tiny_tokenizer: Tokenizer) -> None:
    text = "alpha beta gamma " * 40
    messages = [user("old"), assistant("older"), user(text)]
    prompt = encode_chat(tiny_tokenizer, messages, max_new_tokens=1, truncation=50)
    head = [*tiny_tokenizer.encode("Human: "), *tiny_tokenizer.encode(text + "\n\n")]
    tail = tiny_tokenizer.encode("Assistant: ")
    assert len(prompt.ids) == 50
    assert prompt.ids == head[: 50 - len(tail)] + tail
    assert prompt.dropped_rounds == 1
    assert prompt.cut_tokens == len(head) + len(tail) - 50


def test_system_message_survives_truncation(tiny_tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be kind."}, *CONVERSATION]
    prompt = encode_chat(tiny_tokenizer, messages, max_new_tokens=1, truncation=60)
    assert prompt.dropped_rounds == 1
    assert tiny_tokenizer.decode(prompt.ids).startswith("Human: Be kind.\nHuman: who")
    messages = [{"role": "system", "content": "word " * 99}, user("x " * 99)]
    prompt = encode_chat(tiny_tokenizer, messages, max_new_tokens=1, truncation=80)
    assert len(prompt.ids) == 80
    assert prompt.cut_tokens > 0
    assert "Human: x x" in tiny_tokenizer.decode(prompt.ids)
    with pytest.raises(UserError, match="leaves no room"):
        encode_chat(tiny_tokenizer, messages, max_new_tokens=1, truncation=5)


def test_dialogue_mask(tiny_tokenizer: Tokenizer) -> None:
    messages = [*CONVERSATION, assistant("XVERSE")]
    ids, mask = encode_dialogue(tiny_tokenizer, messages)
    prompt = encode_chat(tiny_tokenizer, CONVERSATION, max_new_tokens=1)
    assert ids == [*prompt.ids, *tiny_tokenizer.encode("XVERSE"), EOS]
    learned = [index for index, loss in zip(ids, mask, strict=True) if loss]
    assert tiny_tokenizer.decode(learned, skip_special=False) == "Hi! 你好<|endoftext|>XVERSE<|endoftext|>"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "empty"),
        ("hello", "expected a list"),
        ({"role": "user", "content": "x"}, "expected a list"),
        (["hello"], r"messages\[0\]: expected a mapping"),
        ([{"role": "user"}], r"messages\[0\]: missing key 'content'"),
        ([{"content": "x"}], r"messages\[0\]: missing key 'role'"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content must be text, found NoneType"),
        ([{"role": "usr", "content": "x"}], r"messages\[0\]: unknown role 'usr'; did you mean 'user'\?"),
        (
            [{"role": "user", "content": "x", "contents": "y"}],
            r"unknown key 'contents'; did you mean 'content'",
        ),
    ],
)
def test_wrong_messages(tiny_tokenizer: Tokenizer, messages: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        encode_chat(tiny_tokenizer, messages, max_new_tokens=100)
    with pytest.raises(UserError, match=text):
        encode_dialogue(tiny_tokenizer, messages)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([assistant("x")], r"messages\[0\]: role 'assistant' cannot begin"),
        ([user("x"), user("y")], r"messages\[1\]: role 'user' cannot follow 'user'"),
        ([user("x"), assistant("y"), assistant("z")], r"messages\[2\]: role 'assistant' cannot follow"),
        (
            [user("x"), {"role": "system", "content": "y"}],
            r"messages\[1\]: a system message must be the first",
        ),
        ([user("x")], r"messages\[0\]: the last role must be 'assistant'"),
        ([{"role": "system", "content": "y"}], r"messages\[0\]: the last role"),
    ],
)
def test_training_data_is_in_order(tiny_tokenizer: Tokenizer, messages: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        encode_dialogue(tiny_tokenizer, messages)


@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(("system", "user", "exec", "assistant")),
            st.sampled_from(("", " ", "x\n", "你好")),
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_order_of_roles_is_written(tiny_tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    written = "".join(
        PREFIXES[role] + content + SUFFIXES[role] for role, content in turns if role != "system" or content
    )
    prompt = encode_chat(tiny_tokenizer, messages, max_new_tokens=1)
    assert tiny_tokenizer.decode(prompt.ids, skip_special=False) == written + "Assistant: "
    if turns[-1][0] == "assistant":
        continued = encode_chat(tiny_tokenizer, messages, max_new_tokens=1, continue_last=True)
        assert continued.ids == prompt.ids[: len(continued.ids)]
        assert tiny_tokenizer.decode(continued.ids, skip_special=False) == written.removesuffix(
            "<|endoftext|>"
        )
    short = encode_chat(tiny_tokenizer, messages, max_new_tokens=1, truncation=12)
    assert len(short.ids) <= 12


def test_dialogue_must_end_with_the_assistant(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"messages\[2\]: the last role must be 'assistant'"):
        encode_dialogue(tiny_tokenizer, CONVERSATION)


def test_template_text_equals_decoded_chat_ids(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    odd = [user(" {{ x }} <b>&'\"\n"), assistant("  a▁b\n"), user("{% raw %}\\n")]
    for messages in (CONVERSATION, [{"role": "system", "content": "Be brief."}, *CONVERSATION], odd):
        ids = encode_chat(tiny_tokenizer, messages, max_new_tokens=1).ids
        text = tiny_tokenizer.decode(ids, skip_special=False)
        assert render_template(messages) == text
        assert auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    finished = [*CONVERSATION, assistant("ok")]
    ids, _ = encode_dialogue(tiny_tokenizer, finished)
    assert render_template(finished, False) == tiny_tokenizer.decode(ids, skip_special=False)


def test_where_template_ids_differ_from_chat_ids(tiny_tokenizer: Tokenizer) -> None:
    """The space of "Human: " joins the word after it when the whole text is tokenised at once."""
    messages = [user("the end")]
    chat = encode_chat(tiny_tokenizer, messages, max_new_tokens=1).ids
    whole = tiny_tokenizer.encode(render_template(messages), allow_special=True)
    shown = [[tiny_tokenizer.decode([index]) for index in ids] for ids in (chat, whole)]
    assert chat != whole
    assert " the" not in shown[0]
    assert " the" in shown[1]
    assert "".join(shown[0]) == "".join(shown[1])
    # Where no word follows the prefix directly there is nothing to join: Chinese punctuation, for one.
    messages = [user("“你好”")]
    chat = encode_chat(tiny_tokenizer, messages, max_new_tokens=1).ids
    assert chat == tiny_tokenizer.encode(render_template(messages), allow_special=True)


def test_template_is_sandboxed_and_strict() -> None:
    with pytest.raises(UserError, match="system message must be the first"):
        render_template([user("x"), {"role": "system", "content": "y"}])
    with pytest.raises(UserError, match="unknown role tool"):
        render_template([{"role": "tool", "content": "y"}])
    with pytest.raises(UserError, match="chat template"):
        render_template([user("x")], template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(UserError, match="chat template"):
        render_template([user("x")], template="{{ messages.append(1) }}")
    with pytest.raises(UserError, match="chat template"):
        render_template([user("x")], template="{% if %}")


def test_saved_template_is_the_template(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == CHAT_TEMPLATE


def test_typed_markers_in_transformers(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Ids by default; with ``split_special_tokens`` text, also at the ends of turns."""
    from transformers import AutoTokenizer

    tiny_tokenizer.save(tmp_path)
    conversation = [user("x<|endoftext|>"), assistant("y"), user("z")]
    for options, ends in (({}, 2), ({"split_special_tokens": True}, 0)):
        auto = AutoTokenizer.from_pretrained(tmp_path, **options)
        assert auto.encode("x<|endoftext|>").count(EOS) == ends // 2
        ids = auto.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert ids.count(EOS) == ends
    assert encode_chat(tiny_tokenizer, conversation, max_new_tokens=1).ids.count(EOS) == 1

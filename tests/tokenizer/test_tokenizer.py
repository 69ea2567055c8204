"""Encoding, decoding, streaming, loading, saving."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scale import examples
from xverse.config import UserError
from xverse.tokenizer import SPECIAL_TOKENS, Tokenizer

relaxed = settings(
    max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Any Unicode text, and pieces that are special to this tokenizer more often than chance would have it.
characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
pieces = st.sampled_from(
    [
        "▁",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "<unk>",
        "<|endoftext|>",
        "<0xE2>",
        "<0x41>",
        "你好",
        "é",
        "🙂",
        "12",
    ]
)
texts = st.lists(characters | pieces, max_size=12).map("".join)


@relaxed
@given(text=texts)
def test_round_trip_is_lossless(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert tiny_tokenizer.encode_batch([text, "a", text])[2] == ids


@relaxed
@given(data=st.data(), skip=st.booleans())
def test_stream_equals_full_decode(tiny_tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    any_id = st.integers(0, tiny_tokenizer.vocab_size - 1) | st.integers(4, 259)  # byte tokens often
    ids = data.draw(st.lists(any_id, max_size=40))
    decoder = tiny_tokenizer.stream(skip_special=skip)
    deltas = [decoder.push(index) for index in ids] + [decoder.finish()]
    assert "".join(deltas) == tiny_tokenizer.decode(ids, skip_special=skip)


@relaxed
@given(text=texts)
def test_stream_never_emits_half_a_character(tiny_tokenizer: Tokenizer, text: str) -> None:
    decoder = tiny_tokenizer.stream()
    emitted = ""
    for index in tiny_tokenizer.encode(text):
        emitted += decoder.push(index)
        assert text.startswith(emitted)
    assert decoder.finish() == ""
    assert emitted == text


def test_unfinished_character_is_held_back_then_replaced(tiny_tokenizer: Tokenizer) -> None:
    decoder = tiny_tokenizer.stream()
    assert [decoder.push(4 + byte) for byte in "𠮷".encode()] == ["", "", "", "𠮷"]
    assert decoder.push(4 + 0xF0) == ""
    assert decoder.finish() == "�"


def test_structure(tiny_tokenizer: Tokenizer) -> None:
    backend = tiny_tokenizer.backend
    assert tuple(backend.id_to_token(index) for index in range(4)) == SPECIAL_TOKENS
    assert [backend.id_to_token(4 + byte) for byte in range(256)] == [f"<0x{b:02X}>" for b in range(256)]
    tokens = [backend.id_to_token(index) for index in range(260, tiny_tokenizer.vocab_size)]
    singles = [token for token in tokens if len(token) == 1]
    assert tokens[: len(singles)] == sorted(singles)  # characters first, in code-point order
    shown = [tiny_tokenizer.decode([index]) for index in tiny_tokenizer.encode("a 12,b")]
    assert shown == ["a", " ", "1", "2", ",", "b"]  # digits one by one, punctuation alone
    assert not {tiny_tokenizer.bos_id, tiny_tokenizer.eos_id} & set(tiny_tokenizer.encode("Hello"))


def test_space_marker_in_text_is_written_as_bytes(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.encode("▁") == [4 + 0xE2, 4 + 0x96, 4 + 0x81]
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("a▁ b")) == "a▁ b"


def test_special_text_stays_text_unlike_upstream(tiny_tokenizer: Tokenizer) -> None:
    """Upstream maps special strings to ids wherever they stand; here only with ``allow_special``."""
    text = "a<|endoftext|>b"
    ids = tiny_tokenizer.encode(text)
    assert not set(ids) & tiny_tokenizer.special_ids
    assert tiny_tokenizer.decode(ids) == text
    upstream = tiny_tokenizer.encode(text, allow_special=True)
    assert tiny_tokenizer.eos_id in upstream
    assert upstream == tiny_tokenizer.backend.encode(text).ids
    assert tiny_tokenizer.decode(upstream) == "ab"
    assert tiny_tokenizer.decode(upstream, skip_special=False) == text


def test_surrogates(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("x\ud83d")) == "x�"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("\ud83d\ude00")) == "😀"
    assert tiny_tokenizer.encode_batch(["x\ud83d"]) == [tiny_tokenizer.encode("x�")]


def test_id_outside_the_vocabulary(tiny_tokenizer: Tokenizer) -> None:
    for index in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(UserError, match="outside the vocabulary"):
            tiny_tokenizer.decode([index])


def test_save_load_hash_and_pickle(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path / "saved")
    from_directory = Tokenizer.load(tmp_path / "saved")
    from_file = Tokenizer.load(tmp_path / "saved" / "tokenizer.json")
    assert from_directory.hash == from_file.hash == tiny_tokenizer.hash
    assert pickle.loads(pickle.dumps(tiny_tokenizer)).encode("Hello") == tiny_tokenizer.encode("Hello")
    changed = copy.deepcopy(tiny_tokenizer.values)
    changed["model"]["merges"].pop()
    assert Tokenizer(changed).hash != tiny_tokenizer.hash


def test_stock_auto_tokenizer(tiny_tokenizer: Tokenizer, tiny_texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (auto.unk_token_id, auto.pad_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 1, 2, 3)
    assert auto.padding_side == "left"
    assert auto.model_max_length == 8192
    assert auto.clean_up_tokenization_spaces is False
    assert set(auto("Hello")) == {"input_ids", "attention_mask"}
    for text in [*tiny_texts, " it 's , a  test .", "𠮷<|endoftext|>"]:
        ids = auto(text)["input_ids"]
        assert ids == tiny_tokenizer.encode(text, allow_special=True)
        assert auto.decode(ids) == text
    auto.save_pretrained(tmp_path / "again")  # formatted otherwise, but the same tokenizer
    assert Tokenizer.load(tmp_path / "again").hash == tiny_tokenizer.hash


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    result = copy.deepcopy(values)
    del result["model"]["vocab"][name]
    result["added_tokens"] = [token for token in result["added_tokens"] if token["content"] != name]
    return result


def test_refused_files(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = tiny_tokenizer.values
    byte_level = {**values, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    wrong_id = copy.deepcopy(values)
    wrong_id["model"]["vocab"]["<pad>"], wrong_id["model"]["vocab"]["<unk>"] = 0, 1
    wrong_id["added_tokens"] = []
    broken_merge = copy.deepcopy(values)
    broken_merge["model"]["merges"].append(["no such", "tokens"])
    for content, message in [
        ("{", "invalid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", r"not a tokenizer\.json \(it has no model\)"),
        ('{"model": {}}', "no BPE model"),
        ('{"model": {"type": "WordPiece", "vocab": {}}}', "a WordPiece tokenizer"),
        (json.dumps(byte_level), "no Metaspace"),
        (json.dumps(without(values, "<|endoftext|>")), r"<\|endoftext\|> must have id 3, but it is missing"),
        (json.dumps(wrong_id), "<pad> must have id 1, but it has id 0"),
        (json.dumps(broken_merge), "not a usable tokenizer.json"),
        (json.dumps({**values, "added_tokens": 3}), "added_tokens"),
        (json.dumps({**values, "added_tokens": [{"id": 1}]}), "added_tokens"),
    ]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\x80\x81")
    with pytest.raises(UserError, match="invalid UTF-8"):
        Tokenizer.load(path)

"""``xverse tokenizer report``: figures by hand, and other vocabularies as their own libraries read them."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import pytest

from xverse.cli import main
from xverse.config import UserError
from xverse.markdown import table
from xverse.tokenizer import Tokenizer
from xverse.tokenizer.report import as_json, by_file, measure, overview
from xverse.tokenizer.vocabularies import load_vocabulary


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    english, chinese = tmp_path / "en.txt", tmp_path / "zh.txt"
    english.write_text("the cat and the dog\nand a 猫\n", encoding="utf-8")
    chinese.write_text("今天天气很好，我们去公园散步，看见许多花。\n", encoding="utf-8")
    return [english, chinese]


@pytest.fixture
def bytes_tiktoken(tmp_path: Path) -> Path:
    """The 256 bytes and two merges, as a file of ranks."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)))
    return path


def test_figures(tiny_tokenizer: Tokenizer, tmp_path: Path, texts: list[Path], bytes_tiktoken: Path) -> None:
    tiny_tokenizer.save(tmp_path / "tok")
    ours = measure(load_vocabulary(f"mine={tmp_path / 'tok'}"), texts)
    other = measure(load_vocabulary(bytes_tiktoken), texts)
    text = texts[0].read_text(encoding="utf-8")
    ids = tiny_tokenizer.encode(text)
    row = ours.files[0]
    assert (row.documents, row.characters, row.bytes, row.words) == (1, 28, 30, 8)
    assert row.tokens == len(ids)
    assert row.fallback_tokens == sum(index in tiny_tokenizer.byte_ids for index in ids)
    assert row.rates["fertility"] == round(len(ids) / 8, 4)
    assert ours.files[1].rates["fertility"] is None  # Chinese writes no spaces
    assert ours.unused == tiny_tokenizer.vocab_size - len(
        {index for path in texts for index in tiny_tokenizer.encode(path.read_text(encoding="utf-8"))}
    )
    # Two "the" of one token each; all else single bytes, of which those of 猫 are parts of a character.
    assert other.files[0].tokens == 30 - 2 * 2
    assert other.files[0].fallback_tokens == 3
    ratio = math.prod(a.tokens / b.tokens for a, b in zip(ours.files, other.files, strict=True)) ** 0.5
    assert ours.ratio(other) == pytest.approx(ratio)
    assert as_json([ours, other])[1]["tokens_ratio"] == round(ratio, 4)
    assert by_file([ours, other])[1][0] == "en"
    head, *rows = overview([ours, other])
    lines = table(head, rows)
    assert lines[2].startswith("| mine |")
    assert {line.count("|") for line in lines} == {8}


def test_sentencepiece_and_its_gguf_agree(tmp_path: Path, tiny_texts: list[str], texts: list[Path]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    import gguf

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny_texts),
        model_prefix=str(tmp_path / "small"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
    size = model.get_piece_size()
    kinds = [
        6 if model.is_byte(i) else 2 if model.is_unknown(i) else 3 if model.is_control(i) else 1
        for i in range(size)
    ]
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([model.get_score(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    lines = [*tiny_texts[:30], "  two  spaces ", "龘"]
    first, second = load_vocabulary(tmp_path / "small.model"), load_vocabulary(tmp_path / "small.gguf")
    assert first.encode(lines) == second.encode(lines) == model.encode(lines)
    assert first.size == second.size == size
    assert first.pieces == second.pieces
    assert measure(first, texts).files[0].fallback_tokens >= 3


def test_the_command_writes_table_json_and_plot(
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    texts: list[Path],
    bytes_tiktoken: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_tokenizer.save(tmp_path / "tok")
    out = tmp_path / "report"
    common = ["tokenizer", "report", "--tokenizer", str(tmp_path / "tok"), "--against"]
    arguments = [*common, f"small={bytes_tiktoken}", "--out", str(out), "--", *map(str, texts)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "zh.txt" in shown
    assert "small" in shown
    values = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert values["hash"] == tiny_tokenizer.hash
    assert values["against"][0]["vocab_size"] == 258
    assert (out / "report.md").read_text(encoding="utf-8").count("| zh") == 2
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tiktoken", b"aGk= 0\nnonsense\n", "line 2 is not a token"),
        ("b.model", b"\x00broken", "cannot be read"),
        ("c.gguf", b"GGUF\x03", "cannot be read as GGUF"),
        ("d.bin", b"?", "not a vocabulary"),
        ("e.json", b"{}", "not a tokenizer.json"),
        ("f.json", b'{"model": {"type": "BPE"}}', "not a usable tokenizer.json"),
    ],
)
def test_what_is_no_vocabulary(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_vocabulary(path)
    with pytest.raises(UserError, match="no such file"):
        load_vocabulary(tmp_path / "none.model")


@pytest.mark.data
def test_published_vocabularies(test_data: Path) -> None:
    """Sizes as published; 你好世界 and a sentence come back from what tiktoken and sentencepiece give."""
    folder = test_data / "tokenizers"
    for name, size in {
        "llama3.tokenizer.model": 128_000,
        "qwen1.qwen.tiktoken": 151_643,
        "llama2.tokenizer.model": 32_000,
        "internlm.V7_sft.model": 103_168,
        "ggml-vocab-baichuan.gguf": 64_000,
    }.items():
        vocabulary = load_vocabulary(folder / name)
        assert vocabulary.size == size
        [ids, numbers] = vocabulary.encode(["你好世界", "12345"])
        assert 1 <= len(ids) <= 13
        assert len(numbers) == (2 if name.startswith("llama3") else 5) or not name.startswith(
            ("llama3", "qwen")
        )
    with pytest.raises(UserError, match="only sentencepiece's is read"):
        load_vocabulary(folder / "ggml-vocab-falcon.gguf")

"""Tokenizers and prompts of other publishers' models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from xverse.config import UserError
from xverse.formats.foreign import ForeignTokenizer, load_foreign_tokenizer
from xverse.formats.foreign.chat import VICUNA_SYSTEM, chat_of

sentencepiece = pytest.importorskip("sentencepiece", reason='needs pip install "xverse-lm[eval]"')

TEXTS = [
    "",
    " ",
    "Hello, world",
    "  two  spaces",
    "问：天气\n答：晴 🙂",
    "a\tb\r\n",
    "2023 <s> </s> <unk>",
    "é",
]
PIECE_FAMILIES = ("baichuan", "baichuan2-chat", "chatglm2", "internlm", "llama", "vicuna")


@pytest.fixture(scope="session")
def processor(spm_bytes: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=spm_bytes)


@pytest.fixture
def load(foreign_tokenizers: dict[str, Path]) -> Any:
    def load(family: str) -> ForeignTokenizer:
        return load_foreign_tokenizer(foreign_tokenizers["sentencepiece"], family)

    return load


def write_llama_json(path: Path, processor: Any) -> Path:
    """``tokenizer.json`` of the same vocabulary, as conversions of Llama lay it out."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {processor.id_to_piece(index): index for index in range(processor.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for index, piece in enumerate(vocab)
        if processor.is_unknown(index) + processor.is_control(index) + processor.is_byte(index) == 0
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and piece not in ("<eoh>", "<eoa>")
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.enable_truncation(2)  # as a training run may have left it
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("family", PIECE_FAMILIES)
def test_ids_are_sentencepieces_own(family: str, load: Any, processor: Any, tiny_texts: list[str]) -> None:
    tokenizer = load(family)
    for text in [*TEXTS, *tiny_texts]:
        assert tokenizer.encode(text) == processor.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id == 2


def test_what_stands_before_a_text(load: Any) -> None:
    found = {family: load(family).bos_ids for family in PIECE_FAMILIES}
    assert found == {
        "baichuan": (),
        "baichuan2-chat": (),
        "chatglm2": (481, 483),  # [gMASK] and sop, behind the 480 pieces
        "internlm": (1,),
        "llama": (1,),
        "vicuna": (1,),
    }
    glm = load("chatglm2")
    assert [glm.token_id(token) for token in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")] == [
        *range(480, 485)
    ]
    assert glm.vocab_size == 485
    assert load("llama").vocab_size == 480


def test_decoding_leaves_special_and_padding_ids_out(load: Any, processor: Any) -> None:
    ids = processor.encode("Hello")
    assert load("chatglm2").decode([481, 483, *ids, 2, 499]) == "Hello"
    assert load("llama").decode([1, *ids, 2]) == "Hello"


def test_token_ids(load: Any, processor: Any) -> None:
    tokenizer = load("internlm-chat")
    assert tokenizer.token_id("<eoa>") == processor.piece_to_id("<eoa>") != processor.unk_id()
    assert tokenizer.token_id("<unk>") == processor.unk_id()
    assert tokenizer.token_id("no such token") is None


@pytest.mark.parametrize("family", ["baichuan", "llama"])
@pytest.mark.parametrize("stated", [True, False])
def test_the_published_settings_decide_on_bos(
    family: str, stated: bool, foreign_tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(foreign_tokenizers["sentencepiece"], tmp_path / "model")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": stated, "tokenizer_class": "LLaMATokenizer", "bos_token": ""})
    )
    assert load_foreign_tokenizer(directory, family).bos_ids == ((1,) if stated else ())


def test_a_llama_tokenizer_json_gives_the_same_ids(
    tmp_path: Path, processor: Any, tiny_texts: list[str]
) -> None:
    tokenizer = load_foreign_tokenizer(write_llama_json(tmp_path / "model", processor), "llama")
    for text in [*TEXTS[1:], *tiny_texts]:
        assert tokenizer.encode(text) == processor.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_ids, tokenizer.eos_id, tokenizer.vocab_size) == ((1,), 2, 480)
    assert tokenizer.decode([1, *processor.encode("Hello"), 2]) == "Hello"


@pytest.mark.parametrize("family", ["falcon", "mpt"])
def test_byte_level_tokenizers(
    family: str, foreign_tokenizers: dict[str, Path], tiny_texts: list[str]
) -> None:
    import tokenizers

    directory = foreign_tokenizers["byte-level"]
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = load_foreign_tokenizer(directory, family)
    for text in [*TEXTS, *tiny_texts]:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    end = tokenizer.eos_id
    assert (tokenizer.bos_ids, end) == ((), library.token_to_id("<|endoftext|>"))
    assert tokenizer.vocab_size == library.get_vocab_size() > library.get_vocab_size(with_added_tokens=False)
    assert end not in tokenizer.encode("one<|endoftext|>two"), "text must not become a special token"
    assert tokenizer.decode([*tokenizer.encode("one"), end]) == "one"


USER, REPLY, AGAIN = (
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me"},
    {"role": "user", "content": "天气"},
)
SYSTEM = {"role": "system", "content": "Be brief"}


def test_baichuan2_chat(load: Any, processor: Any) -> None:
    chat, stops = chat_of("baichuan2-chat", load("baichuan2-chat"))
    assert chat is not None
    encode = processor.encode
    assert chat([USER]) == [195, *encode("Who?"), 196]
    expected = [*encode("Be brief"), 195, *encode("Who?"), 196, *encode("Me"), 195, *encode("天气"), 196]
    assert chat([SYSTEM, USER, REPLY, AGAIN]) == expected
    assert stops == (2,)


def test_chatglm2_chat(load: Any, processor: Any) -> None:
    chat, _ = chat_of("chatglm2", load("chatglm2"))
    assert chat is not None
    assert chat([USER]) == [481, 483, *processor.encode("[Round 1]\n\n问：Who?\n\n答：")]
    text = "[Round 1]\n\n问：Who?\n\n答：Me\n\n[Round 2]\n\n问：天气\n\n答："
    assert chat([USER, REPLY, AGAIN]) == [481, 483, *processor.encode(text)]


def test_internlm_chat(load: Any, processor: Any) -> None:
    chat, stops = chat_of("internlm-chat", load("internlm-chat"))
    assert chat is not None
    ids = chat([USER])
    assert ids == [1, *processor.encode("<|User|>:Who?<eoh>\n<|Bot|>:")]
    assert ids.count(processor.piece_to_id("<eoh>")) == 1
    text = "<|User|>:Who?<eoh>\n<|Bot|>:Me<eoa>\n<|User|>:天气<eoh>\n<|Bot|>:"
    assert chat([USER, REPLY, AGAIN]) == [1, *processor.encode(text)]
    assert stops == (2, processor.piece_to_id("<eoa>"))


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_vicuna_chat(kind: str, load: Any, processor: Any, tmp_path: Path) -> None:
    if kind == "tokenizer.model":
        tokenizer = load("vicuna")
    else:
        tokenizer = load_foreign_tokenizer(write_llama_json(tmp_path / "model", processor), "vicuna")
    chat, _ = chat_of("vicuna", tokenizer)
    assert chat is not None
    assert chat([USER]) == [1, *processor.encode(f"{VICUNA_SYSTEM} USER: Who? ASSISTANT:")]
    ids = chat([SYSTEM, USER, REPLY, AGAIN])
    first = [1, *processor.encode("Be brief USER: Who? ASSISTANT: Me"), 2]
    assert ids[: len(first)] == first
    pieces = [processor.id_to_piece(index) for index in ids[len(first) :]]
    assert pieces[0].startswith("U"), "no space follows </s>"
    assert processor.decode(pieces) == "USER: 天气 ASSISTANT:"


def test_who_has_no_chat(load: Any) -> None:
    for family in ("baichuan", "baichuan2", "falcon", "internlm", "llama", "mpt"):
        assert chat_of(family, load("llama"))[0] is None


@pytest.mark.parametrize(
    ("family", "messages", "said"),
    [
        ("chatglm2", [SYSTEM, USER], "no system message"),
        ("internlm-chat", [SYSTEM, USER], "no system message"),
        ("vicuna", [USER, REPLY], "the last role must be 'user'"),
        ("vicuna", [], "the list is empty"),
        ("baichuan2-chat", [USER, REPLY, {"role": "exec", "content": "x"}], "last role"),
        (
            "baichuan2-chat",
            [USER, REPLY, {"role": "exec", "content": "x"}, REPLY, AGAIN],
            "role 'exec' is specific to XVERSE",
        ),
    ],
)
def test_conversations_that_do_not_fit(family: str, messages: Any, said: str, load: Any) -> None:
    chat, _ = chat_of(family, load(family))
    assert chat is not None
    with pytest.raises(UserError, match=said):
        chat(messages)

"""Chat formats that publishers have in code only: ids as their code makes them, replies with their ends."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from xverse.config import UserError
from xverse.engine.load import ending_ids
from xverse.finetune.fields import TEMPLATES
from xverse.formats import ModelDirectory
from xverse.formats.gguf import save_gguf
from xverse.model import XverseConfig, XverseForCausalLM, init_weights
from xverse.tokenizer import encode_chat, encode_dialogue
from xverse.tokenizer.general import load_tokenizer_of
from xverse.tokenizer.published import FORMATS, with_format
from xverse.values import CHAT_FORMATS

sentencepiece = pytest.importorskip("sentencepiece", reason='needs pip install "xverse-lm[eval]"')
TEXTS = ["", " ", "Hello, world", "  two  spaces", "问：天气\n答：晴 🙂", "a\tb\r\n", "2023 <s>", "é"]
RESERVED = [f"<reserved_{index}>" for index in (106, 107)]
CONFIG: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 512, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SYSTEM, USER, REPLY, AGAIN = (
    {"role": role, "content": text}
    for role, text in (("system", "Be brief"), ("user", "Who?"), ("assistant", "Me"), ("user", "天气"))
)


def trained(texts: list[str], **options: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in texts if text.isascii()]), model_writer=written,
        vocab_size=400 if "model_type" in options else 480, byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
        user_defined_symbols=["<eoh>", "<eoa>", *RESERVED],
        **{"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        | options,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module")
def proto(tiny_texts: list[str]) -> bytes:
    return trained(tiny_texts)


@pytest.fixture(scope="module")
def processor(proto: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


@pytest.fixture
def model(proto: bytes, tmp_path: Path) -> Any:
    def make(name: str, generation: dict[str, Any] | None = None, **values: Any) -> ModelDirectory:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "tokenizer.model").write_bytes(proto)
        (path / "config.json").write_text(json.dumps({**CONFIG, **values}))
        (path / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "SomeTokenizer", "bos_token": "", "auto_map": {"AutoTokenizer": "x"}}
            )
        )
        (path / "generation_config.json").write_text(json.dumps(generation or {}))
        return ModelDirectory.of(path)

    return make


def prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return encode_chat(tokenizer, messages, max_new_tokens=8, max_positions=512, truncation=512).ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ],
)
def test_a_model_file_gives_sentencepieces_ids(
    options: dict[str, Any], tiny_texts: list[str], tmp_path: Path
) -> None:
    data = trained(tiny_texts, **options)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer, theirs = load_tokenizer_of(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in [*TEXTS, *tiny_texts[:200]]:
        assert tokenizer.encode(text) == theirs.encode(text), repr(text)
        if not options.get("remove_extra_whitespaces"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix_ids) == (1, 2, (1,))
    texts = [text.strip() or "a" for text in TEXTS]  # a leading space is another one in GGUF
    config = XverseConfig.from_json({**CONFIG, "model_type": "llama", "num_key_value_heads": 2})
    model = XverseForCausalLM(config)
    init_weights(model, 0)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    again = ModelDirectory.of(tmp_path / "m.gguf").tokenizer
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_baichuan2_chat(model: Any, processor: Any) -> None:
    user, reply = (processor.piece_to_id(text) for text in RESERVED)
    roles = {"user_token_id": user, "assistant_token_id": reply}
    tokenizer = model("baichuan2", roles, model_type="baichuan").tokenizer
    encode = processor.encode
    assert prompt(tokenizer, [USER]) == [user, *encode("Who?"), reply]
    expected = [
        *encode("Be brief"),
        user,
        *encode("Who?"),
        reply,
        *encode("Me"),
        user,
        *encode("天气"),
        reply,
    ]
    assert prompt(tokenizer, [SYSTEM, USER, REPLY, AGAIN]) == expected
    ids, mask = encode_dialogue(tokenizer, [USER, REPLY])
    assert ids == [user, *encode("Who?"), reply, *encode("Me"), 2]
    assert [index for index, kept in zip(ids, mask, strict=True) if kept] == [*encode("Me"), 2]
    base = model("base", model_type="baichuan").tokenizer
    assert base.template is None
    assert prompt(with_format(base, "baichuan2", "base"), [USER]) == [user, *encode("Who?"), reply]


def test_the_format_of_internlm(model: Any, processor: Any, tmp_path: Path) -> None:
    directory = model("internlm-chat-7b", model_type="internlm")
    tokenizer, end = directory.tokenizer, processor.piece_to_id("<eoa>")
    encode = processor.encode
    assert prompt(tokenizer, [USER]) == [1, *encode("<|User|>:Who?<eoh>\n<|Bot|>:")]
    text = "<|User|>:Who?<eoh>\n<|Bot|>:Me<eoa>\n<|User|>:天气<eoh>\n<|Bot|>:"
    assert prompt(tokenizer, [USER, REPLY, AGAIN]) == [1, *encode(text)]
    ids, mask = encode_dialogue(tokenizer, [USER, REPLY])
    assert [index for index, kept in zip(ids, mask, strict=True) if kept][-1] == end
    config = XverseConfig.from_json(directory.values)
    assert set(ending_ids({}, config.eos_token_id, tokenizer)) == {2, end}
    spelled = prompt(tokenizer, [{"role": "user", "content": "a<eoa>b"}])
    assert end not in spelled  # what a user types stays text
    with pytest.raises(UserError, match="no system message"):
        prompt(tokenizer, [SYSTEM, USER])
    tokenizer.save(tmp_path)  # as fine-tuning does
    again = load_tokenizer_of(tmp_path)
    assert (again.template, again.stop_ids) == (tokenizer.template, (end,))
    assert prompt(again, [USER, REPLY, AGAIN]) == [1, *encode(text)]
    assert model("internlm-7b", model_type="internlm").tokenizer.template is None


def test_vicuna_chat(model: Any, processor: Any) -> None:
    tokenizer = model("lmsys/vicuna-7b-v1.5", model_type="llama").tokenizer
    ids = prompt(tokenizer, [SYSTEM, USER, REPLY, AGAIN])
    first = [1, *processor.encode("Be brief USER: Who? ASSISTANT: Me"), 2]
    assert ids[: len(first)] == first
    assert ids[len(first) :] == processor.encode("USER: 天气 ASSISTANT:")


def test_formats_by_name(model: Any, processor: Any) -> None:
    assert tuple(FORMATS) == CHAT_FORMATS == TEMPLATES[2:]
    tokenizer = model("base", model_type="llama").tokenizer
    assert tokenizer.template is None
    texts = {}
    for name in FORMATS:
        if name == "chatml":
            with pytest.raises(UserError, match=r"needs <\|im_start\|>, <\|im_end\|>, which the tokenizer"):
                with_format(tokenizer, name, "base")
            continue
        chosen = with_format(tokenizer, name, "base")
        assert with_format(chosen, name, "base") is chosen
        messages = [USER, REPLY, AGAIN] if name == "intern" else [SYSTEM, USER, REPLY, AGAIN]
        texts[name] = chosen.decode(prompt(chosen, messages), skip_special=False)
        assert encode_dialogue(chosen, [USER, REPLY])[1][-1] or name in ("alpaca", "intern")
    assert texts["llama2"] == (
        "<s> [INST] <<SYS>>\nBe brief\n<</SYS>>\n\nWho? [/INST] Me </s><s> [INST] 天气 [/INST]"
    )
    assert texts["alpaca"] == (
        "<s> Be brief\n\n### Instruction:\nWho?\n\n### Response:\nMe</s> \n\n"
        "### Instruction:\n天气\n\n### Response:\n"
    )
    with pytest.raises(UserError, match="has a chat format of its own"):
        with_format(with_format(tokenizer, "vicuna", "base"), "llama2", "base")

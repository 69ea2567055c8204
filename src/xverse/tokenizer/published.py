"""Chat formats that publishers describe in code only, as Jinja templates, by LLaMA-Factory's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xverse.config import UserError, choose
from xverse.tokenizer.general import BOS_APART, STOP_TOKEN, GeneralTokenizer
from xverse.tokenizer.pieces import PREFIXED, added_token, metaspace
from xverse.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatFormat:
    """A chat ``template`` with the special ``tokens`` that it writes. A reply ends with ``end``, if it is not
    the end of text. ``joined``: sentencepiece reads the special tokens as parts of one text, so that no space
    follows them."""

    template: str
    tokens: tuple[str, ...] = ()
    end: str = ""
    joined: bool = False


_ONLY_FIRST = "{% elif not loop.first %}{{ raise_exception('a system message must be the first one') }}"
_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content']"
_EACH = "{% for message in messages %}{% if message['role'] == 'user' %}"
_REPLY = "{% elif message['role'] == 'assistant' %}"
_END = "{% endif %}{% endfor %}"

FORMATS = {
    "alpaca": ChatFormat(  # stanford_alpaca's train.py
        "{{ bos_token }}" + _SYSTEM + " + '\n\n' }}{% else %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n' }}{% endif %}"
        + _EACH + "{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
        + _REPLY + "{{ message['content'] + eos_token + '\n\n' }}" + _ONLY_FIRST + _END
    ),
    "baichuan2": ChatFormat(  # generation_utils.py of Baichuan2-7B-Chat
        _SYSTEM + " }}{% endif %}"
        + _EACH + "{{ '<reserved_106>' + message['content'] }}"
        + _REPLY + "{{ '<reserved_107>' + message['content'] }}" + _ONLY_FIRST + _END
        + "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}",
        ("<reserved_106>", "<reserved_107>"),
    ),
    "chatml": ChatFormat(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "intern": ChatFormat(  # build_inputs of internlm-chat-7b's modeling_internlm.py
        "{{ bos_token }}" + _EACH + "{{ '<|User|>:' + message['content'] + '<eoh>\n<|Bot|>:' }}"
        + _REPLY + "{{ message['content'] + '<eoa>\n' }}"
        "{% else %}{{ raise_exception('this chat format has no system message') }}" + _END,
        ("<eoh>", "<eoa>"),
        "<eoa>",
        joined=True,
    ),
    "llama2": ChatFormat(  # chat_completion of Meta's llama/generation.py
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' "
        "if messages[0]['role'] == 'system' else '' %}"
        + _EACH + "{{ bos_token + '[INST] ' + (system if loop.index0 == (1 if system else 0) else '') "
        "+ message['content'].strip() + ' [/INST]' }}"
        + _REPLY + "{{ ' ' + message['content'].strip() + ' ' + eos_token }}" + _ONLY_FIRST + _END
    ),
    "vicuna": ChatFormat(  # FastChat's conversation.py, "vicuna_v1.1": versions 1.1 to 1.5
        "{{ bos_token }}" + _SYSTEM + " + ' ' }}{% else %}"
        "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user\\'s questions. ' }}{% endif %}"
        + _EACH + "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
        + _REPLY + "{{ ' ' + message['content'] + eos_token }}" + _ONLY_FIRST + _END
    ),
}  # fmt: skip


def with_format(tokenizer: Tokenizer, name: str, where: str) -> Tokenizer:
    """``tokenizer`` with the chat format ``name``, its tokens special. Raises UserError for a tokenizer that
    has another template or lacks a token of the format, and for an unknown name."""
    chosen = choose("template", name, FORMATS)
    if tokenizer.template == chosen.template:
        return tokenizer
    if tokenizer.template is not None or not isinstance(tokenizer, GeneralTokenizer):
        raise UserError(f"template '{name}': {where} has a chat format of its own; use template default")
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    missing = [token for token in chosen.tokens if token not in vocab]
    if missing:
        raise UserError(f"template '{name}' needs {', '.join(missing)}, which the tokenizer of {where} lacks")
    return _applied(tokenizer, chosen)


def published(
    tokenizer: GeneralTokenizer, values: Mapping[str, Any], generation: Mapping[str, Any], directory: Path
) -> GeneralTokenizer:
    """``tokenizer`` with the chat format of a model that has none in its files, or as it is if none is known.

    Baichuan2-Chat has the ids of its role tokens in its ``generation`` config. Others are recognised by the
    names in their configuration and in the last three parts of their path (which contain the name in the
    hub's cache too).
    """
    names = [str(values.get("_name_or_path", "")), *directory.absolute().parts[-3:]]
    names = [name.lower() for name in names]
    chosen = None
    roles = [generation.get(key) for key in ("user_token_id", "assistant_token_id")]
    if values.get("model_type") == "baichuan" and all(isinstance(index, int) for index in roles):
        known = [i for i in roles if isinstance(i, int) and 0 <= i < tokenizer.vocab_size]
        texts = [tokenizer.token_bytes(index).decode() for index in known]
        if len(texts) == 2:
            plain = FORMATS["baichuan2"]
            template = plain.template
            for before, text in zip(plain.tokens, texts, strict=True):
                template = template.replace(before, text)
            chosen = replace(plain, template=template, tokens=tuple(texts))
    elif values.get("model_type") == "internlm" and any("internlm" in n and "chat" in n for n in names):
        chosen = FORMATS["intern"]
    elif any("vicuna" in name for name in names):
        chosen = FORMATS["vicuna"]
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    if chosen is None or any(token not in vocab for token in chosen.tokens):
        return tokenizer
    return _applied(tokenizer, chosen)


def _applied(tokenizer: GeneralTokenizer, chosen: ChatFormat) -> GeneralTokenizer:
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    kept = [
        token for token in tokenizer.values.get("added_tokens") or [] if token["content"] not in chosen.tokens
    ]
    added = [*kept, *(added_token(vocab[token], token, True) for token in chosen.tokens)]
    values = {**tokenizer.values, "added_tokens": sorted(added, key=lambda token: token["id"])}
    settings = dict(tokenizer.settings)
    if chosen.joined and PREFIXED in str(values.get("normalizer")):
        values |= {"normalizer": None, "pre_tokenizer": metaspace("first")}
        settings[BOS_APART] = True
    if chosen.end:
        settings[STOP_TOKEN] = chosen.end
    return GeneralTokenizer(values, settings, chosen.template, tokenizer.where)

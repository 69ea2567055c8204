"""The conversation formats of the publishers of chat models, as token ids.

* Baichuan2-Chat (``generation_utils.py``): token 195 before a user's turn, 196 before the assistant's; a
system
  text comes first, without a token; no ``</s>`` after a reply.
* ChatGLM2 (``build_prompt``): numbered rounds of ``问：`` and ``答：``.
* InternLM-Chat (``build_inputs``): ``<|User|>:…<eoh>`` and ``<|Bot|>:…<eoa>``, each on a line.
* Vicuna 1.1 to 1.5 (FastChat's ``conversation.py``): a system sentence, then ``USER:`` and ``ASSISTANT:``,
  with ``</s>`` after a reply.

Nothing is truncated; the caller shortens conversations that exceed the model's context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from xverse.config import UserError
from xverse.formats.foreign.text import ForeignTokenizer
from xverse.tokenizer.chat import check_messages

Messages = Sequence[Mapping[str, str]]
Chat = Callable[[Messages], list[int]]

BAICHUAN_ROLES = {"user": 195, "assistant": 196}
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat_of(family: str, tokenizer: ForeignTokenizer) -> tuple[Chat | None, tuple[int, ...]]:
    """The prompt builder of a family (None if it has no chat format) and the ids that end a reply.

    The builder raises UserError for messages that are not a conversation ending with the user's turn, and for
    a system message if the format has none.
    """
    make = {
        "baichuan2-chat": _baichuan,
        "chatglm2": _chatglm,
        "internlm-chat": _internlm,
        "vicuna": _vicuna,
    }.get(family)
    end = tokenizer.token_id("<eoa>") if family == "internlm-chat" else None
    stops = (tokenizer.eos_id,) if end is None else (tokenizer.eos_id, end)
    if make is None:
        return None, stops
    return lambda messages: [*tokenizer.bos_ids, *make(tokenizer, messages)], stops


def _turns(messages: Messages, *, system: str = "") -> tuple[str, list[tuple[str, str]]]:
    """The system text, by default ``system``, and (role, content) of each turn."""
    check_messages(messages, last=("user",))
    turns = [(message["role"], message["content"]) for message in messages]
    for index, (role, _) in enumerate(turns):
        if role == "exec":
            raise UserError(
                f"messages[{index}]: role 'exec' is specific to XVERSE; this model has user and assistant"
            )
    if turns[0][0] == "system":
        return turns[0][1], turns[1:]
    return system, turns


def _rounds(messages: Messages) -> tuple[list[tuple[str, str]], str]:
    """(question, reply) of the completed rounds, and the last question, for formats without a system text."""
    system, turns = _turns(messages)
    if system:
        raise UserError("messages[0]: this model's chat format has no system message")
    texts = [content for _, content in turns]
    return list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]


def _baichuan(tokenizer: ForeignTokenizer, messages: Messages) -> list[int]:
    system, turns = _turns(messages)
    ids = tokenizer.encode(system)
    for role, content in turns:
        ids += [BAICHUAN_ROLES[role], *tokenizer.encode(content)]
    return [*ids, BAICHUAN_ROLES["assistant"]]


def _chatglm(tokenizer: ForeignTokenizer, messages: Messages) -> list[int]:
    rounds, last = _rounds(messages)
    text = "".join(
        f"[Round {number}]\n\n问：{question}\n\n答：{reply}\n\n"
        for number, (question, reply) in enumerate(rounds, 1)
    )
    return tokenizer.encode(f"{text}[Round {len(rounds) + 1}]\n\n问：{last}\n\n答：")


def _internlm(tokenizer: ForeignTokenizer, messages: Messages) -> list[int]:
    rounds, last = _rounds(messages)
    text = "".join(f"<|User|>:{question}<eoh>\n<|Bot|>:{reply}<eoa>\n" for question, reply in rounds)
    return tokenizer.encode(f"{text}<|User|>:{last}<eoh>\n<|Bot|>:")


def _vicuna(tokenizer: ForeignTokenizer, messages: Messages) -> list[int]:
    system, turns = _turns(messages, system=VICUNA_SYSTEM)
    ids: list[int] = []
    text = f"{system} "
    for role, content in turns:
        if role == "user":
            text += f"USER: {content} ASSISTANT:"
        else:
            ids += [*_continued(tokenizer, f"{text} {content}", bool(ids)), tokenizer.eos_id]
            text = ""
    return [*ids, *_continued(tokenizer, text, bool(ids))]


def _continued(tokenizer: ForeignTokenizer, text: str, inside: bool) -> list[int]:
    """The ids of ``text``; ``inside`` a prompt without the space that encoding prepends."""
    if not inside:
        return tokenizer.encode(text)
    before = "\n"  # a byte token in Llama's vocabulary, which never merges
    return tokenizer.encode(before + text)[len(tokenizer.encode(before)) :]

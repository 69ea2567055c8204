"""Tokenizer: training, repair, encoding of chats, decoding of streams."""

from xverse.tokenizer.chat import (
    CHAT_TEMPLATE,
    ChatPrompt,
    encode_chat,
    encode_dialogue,
    input_limit,
    render_template,
)
from xverse.tokenizer.repair import repair_file, repair_json
from xverse.tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer
from xverse.tokenizer.train import train_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "ChatPrompt",
    "StreamDecoder",
    "Tokenizer",
    "encode_chat",
    "encode_dialogue",
    "input_limit",
    "render_template",
    "repair_file",
    "repair_json",
    "train_tokenizer",
]

"""Tokenizer: train, repair, encode chats, decode streams (floor 2)."""

from xverse.tokenizer.repair import repair_file, repair_json
from xverse.tokenizer.tokenizer import StreamDecoder, Tokenizer
from xverse.tokenizer.train import train_tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "repair_file", "repair_json", "train_tokenizer"]

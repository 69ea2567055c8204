"""Tokenizer: training, repair, encoding of chats, decoding of streams."""

from xverse.tokenizer.chat import ChatPrompt, encode_chat, encode_dialogue, input_limit
from xverse.tokenizer.chat_template import CHAT_TEMPLATE
from xverse.tokenizer.repair import repair_file, repair_json
from xverse.tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer
from xverse.tokenizer.train import train_tokenizer

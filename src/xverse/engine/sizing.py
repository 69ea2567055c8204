"""How much memory the key-value cache gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xverse.config import UserError
from xverse.engine.cache import BLOCK_SIZE, PagedCache, RaggedContext, SequenceCache
from xverse.engine.graphs import MOST_TOKENS
from xverse.engine.sampling import draw
from xverse.engine.sampling_params import SamplingParams
from xverse.hardware import available_memory, peak_memory, reset_peak_memory, total_memory
from xverse.log import notice
from xverse.model.transformer import XverseForCausalLM
from xverse.tokenizer import Tokenizer

_SHARE = 0.9  # of a GPU's memory; the rest is for fragmentation and other programs
_WIDEST = SamplingParams(top_p=0.9)  # the parameters that take the most memory
_LEAST = 8 * BLOCK_SIZE  # tokens; less is of no use


@dataclass(frozen=True)
class Capacity:
    """``tokens`` that all requests together may have, in ``blocks`` of ``block_size``: some more than they
    fill, because each running request may leave one partly used."""

    tokens: int
    blocks: int
    block_size: int = BLOCK_SIZE


def capacity(
    requested: int | None,
    token_bytes: int,
    device: torch.device,
    *,
    context: int,
    max_batch: int,
    block_size: Callable[..., int] = lambda tokens: BLOCK_SIZE,
    reserved: int = 0,
    agreed: Callable[[int], int] = int,
) -> Capacity:
    """The capacity for ``requested`` tokens, or by default for as many as fit, at most ``max_batch`` texts of
    the ``context``'s length. ``block_size`` gives the size of blocks for a number of tokens;
    ``reserved`` bytes of the device stay free for a step. ``agreed`` turns the free bytes
    into those that each of several processes may use.

    On a CPU, whose pages are resident once they are written, the default is half of the free memory, but at
    least one such text. A GPU gives nine tenths of its memory, less what is in use; a cache for less than the
    context is reported. Raises UserError for more than fits: on a CPU the allocation would succeed and fail
    much later.
    """
    free, most = available_memory(device), max_batch * context
    if device.type == "cuda":
        free -= reserved + int((1 - _SHARE) * total_memory(device))
    free = agreed(free)
    if requested is not None:
        if requested < BLOCK_SIZE:
            raise UserError(f"max_cache_tokens: {requested} is out of range (at least {BLOCK_SIZE})")
        if requested * token_bytes > free:
            raise UserError(
                f"max_cache_tokens: {requested} tokens take {requested * token_bytes / 1e9:.1f} GB, but only "
                f"{max(0, free) / 1e9:.1f} GB of memory are free; at most {max(0, free) // token_bytes} fit"
            )
        size = block_size(tokens=requested)
        filled = -(-requested // size)
        most_blocks = filled + max_batch
        fitting = max(filled, free // (token_bytes * size))
        return Capacity(requested, most_blocks if device.type == "cpu" else min(most_blocks, fitting), size)
    if device.type == "cpu":
        tokens = min(most, max(context, free // 2 // token_bytes))
        return Capacity(tokens, -(-tokens // BLOCK_SIZE) + max_batch)
    if device.type != "cuda":
        free //= 2  # shared with all other programs
    size = block_size(tokens=min(most, free // token_bytes))
    blocks = min(free // (token_bytes * size), -(-most // size) + max_batch)
    if blocks * size < _LEAST:
        raise UserError(
            f"{device}: no memory is left for the key-value cache after the weights and a step; use "
            "--quantize int8 or int4, --kv-dtype int8 or a smaller --max-batch"
        )
    spare = min(max_batch, max(0, blocks - -(-context // size)))
    tokens = (blocks - spare) * size
    if tokens < context:
        notice(
            f"{device}: the key-value cache holds {tokens} tokens in the memory left; texts are limited to "
            f"them instead of {context}; --quantize and --kv-dtype int8 make room"
        )
    return Capacity(tokens, blocks, size)


def step_bytes(
    model: XverseForCausalLM, make_cache: Callable[..., PagedCache], prefill_chunk: int, max_batch: int
) -> int:
    """Bytes that steps take besides weights and cache on a CUDA device, measured: the most of a chunk of a
    prompt, and what recorded graphs hold. 0 on other devices."""
    if model.model.norm.weight.device.type != "cuda":
        return 0
    chunks = (prefill_chunk, min(MOST_TOKENS, prefill_chunk))
    taken = [chunk_bytes(model, make_cache, tokens, max_batch) for tokens in chunks]
    torch.cuda.empty_cache()
    return sum(taken)


@torch.inference_mode()
def chunk_bytes(
    model: XverseForCausalLM, make_cache: Callable[..., PagedCache], tokens: int, max_batch: int
) -> int:
    """How far memory rises while a prompt of ``tokens`` is computed and ``max_batch`` tokens are drawn."""
    device = model.model.norm.weight.device
    sequence = SequenceCache(make_cache(blocks=-(-tokens // BLOCK_SIZE)), tokens)
    sequence.reserve(tokens)
    reset_peak_memory(device)
    before = peak_memory(device)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    hidden = model.model(ids, RaggedContext([(sequence, tokens)]))[0]  # [T, D]
    logits = model.lm_head(hidden[:max_batch]).float()  # [R, V]
    draw(logits, _WIDEST, [0.5] * len(logits))
    return peak_memory(device) - before


def check_settings(
    model: XverseForCausalLM,
    tokenizer: Tokenizer,
    max_batch: int,
    prefill_chunk: int,
    prefix_cache_bytes: int,
) -> None:
    """Raises UserError for settings out of range, and for a tokenizer with more tokens than the model."""
    for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise UserError(f"{name}: {value} is out of range (at least 1)")
    if prefix_cache_bytes < 0:
        raise UserError(f"prefix_cache_bytes: {prefix_cache_bytes} is out of range (at least 0)")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
            "use the tokenizer of the model"
        )

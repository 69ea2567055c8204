"""How many tokens' logits the fused loss holds at a time. The loss computes by it, and every prediction of
memory counts by it. Needs no torch."""

from __future__ import annotations

_BYTES = 32 * 2**20  # of float32 logits: small enough for a last-level cache
# Of bfloat16 logits with the CPU kernels: each chunk reads and writes all of the head's gradient once more.
_KERNEL_BYTES = 128 * 2**20
# On a GPU: each chunk reads the head three times and reads and writes its float32 gradient. 2,048 tokens at
# 100,534 entries; more would save little and take memory.
_CUDA_BYTES = 2**30
_LEAST = 64  # tokens


def loss_chunk(vocabulary: int, device: str = "cpu", kernels: bool = False) -> int:
    """Tokens whose logits over ``vocabulary`` entries exist at a time on a ``device`` ("cpu", "cuda"), with
    PyTorch's operations or, where gradients are recorded, the CPU ``kernels``."""
    if device != "cpu":
        return max(_LEAST, 1 << (_CUDA_BYTES // (4 * vocabulary)).bit_length() - 1)
    if kernels:
        return max(_LEAST, _KERNEL_BYTES // (2 * vocabulary) // 64 * 64)
    return max(_LEAST, _BYTES // (4 * vocabulary))


def logit_bytes(tokens: int, vocabulary: int, device: str = "cpu", kernels: bool = False) -> int:
    """Bytes that one chunk takes of a batch of ``tokens``: with PyTorch's operations float32 logits and their
    gradient. With kernels the gradient takes the place of the bfloat16 logits, but the buffers of bfloat16
    matmuls were measured to take as much as the float32 tensors would."""
    plain = 2 * 4 * vocabulary * min(tokens, loss_chunk(vocabulary))
    if kernels and device == "cpu":
        return max(plain, 2 * vocabulary * min(tokens, loss_chunk(vocabulary, device, kernels)))
    return 2 * 4 * vocabulary * min(tokens, loss_chunk(vocabulary, device))


def head_bytes(tokens: float, vocabulary: float, hidden: int) -> float:
    """Bytes that head and loss move on a GPU besides their three matrix products, forward and backward, with
    float32 weights and bfloat16 logits: 28 of each logit (softmax, exponential, scaling, rounding); the
    weight's cast; its float32 gradient, which each chunk after the first reads and writes, scaled once."""
    chunks = -(-tokens // loss_chunk(int(vocabulary), "cuda"))
    return 28 * tokens * vocabulary + vocabulary * hidden * (6 + 6 + 10 * (chunks - 1) + 8)

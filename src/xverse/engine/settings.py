"""What an engine's settings mean for a model."""

from __future__ import annotations

from xverse.config import UserError
from xverse.engine.ranks import ranks_of
from xverse.kernels.bfloat16 import has_fast_products
from xverse.kernels.linear import QuantLinear
from xverse.kernels.native import TYPES, library
from xverse.kernels.paged_attention import head_fits
from xverse.model.transformer import XverseForCausalLM


def invariance(model: XverseForCausalLM, wanted: bool | None) -> bool:
    """Whether an engine is batch-invariant (see ``Engine``). By default it is where that
    costs little: with quantised weights, whose products are sums of integers, and where PyTorch has no matrix
    instructions that would be faster than the kernels. Raises UserError if it is ``wanted`` where the kernels
    cannot provide it."""
    weight = model.model.norm.weight
    kernels = weight.device.type == "cpu" and weight.dtype in TYPES and library() is not None
    # The experts of one row are added in another order than those of several.
    possible = kernels and head_fits(model.config.head_dim) and not model.config.num_experts
    possible = possible and ranks_of(model) is None  # the parts of a sum are added by the ranks
    if wanted and not possible:
        raise UserError(
            "batch_invariant: needs a CPU, compiled kernels, bfloat16 or float32, heads of a multiple of 32, "
            f"no experts, one process; this is {weight.dtype} on {weight.device.type}, "
            f"{model.config.head_dim} a head"
        )
    if wanted is not None:
        return wanted
    quantised = any(isinstance(module, QuantLinear) for module in model.modules())
    return possible and (quantised or not has_fast_products())

"""The cost model: seconds and bytes of one training step of a layout on a device.

FLOPs, bytes through memory, bytes over links and hops are counted; four shares that cannot be counted are
fitted to published measurements (``benchmarks/studies/plan.py``). docs/plan.md describes it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from xverse.model.chunks import head_bytes
from xverse.plan.devices import Device
from xverse.plan.layout import Architecture, Checkpointing, Layout
from xverse.plan.memory import Memory, memory

Passes = Literal["compiled", "eager", "fused norms", "gelu", "megatron"]


@dataclass(frozen=True)
class Constants:
    """The fitted shares that real programs reach: of the matrix units' peak on Ampere and on Hopper (and
    later), of the memory bandwidth and of a link's rate."""

    ampere: float
    hopper: float
    memory: float
    network: float


FITTED = Constants(0.737, 0.707, 0.422, 0.9)

# Bytes that elementwise operators move in a layer's forward pass in bfloat16, for each token, as multiples of
# hidden_size and intermediate_size; backward moves twice as much. "compiled": a norm with the residual sum
# before it reads two tensors and writes two, rotation reads and writes q and k, SwiGLU reads two and writes
# one. "eager": each operator alone, norms and rotation in float32; "fused norms": eager except for these.
# "gelu": a GPT block with fused layer norms; "megatron": the same with dropout and fused bias.
_PASSES: dict[Passes, tuple[float, float]] = {
    "compiled": (24, 6),
    "eager": (132, 10),
    "fused norms": (60, 10),
    "gelu": (20, 4),
    "megatron": (34, 4),
}
# Forward and backward, each logit, where all of them exist at once.
_LOGIT_BYTES = {"compiled": 14, "eager": 34, "fused norms": 34, "gelu": 34, "megatron": 22}
# Bytes that FSDP copies for each parameter and micro-batch: twice out of the gathered buffer (read and
# written, 2 bytes each), and gradients once from bfloat16 into the float32 buffer that is reduced.
_COPIED_BYTES = 2 * 4 + 6
_START = 8.4e-6  # seconds of any collective, as NCCL's cost model has it
_TREE = 0.92  # a tree's share of a ring's rate in the same model
_SCORE_BYTES = 11  # forward, for each stored attention score: product, masked softmax, dropout


@dataclass(frozen=True, kw_only=True)
class Software:
    """How an implementation computes; the defaults are this trainer's.

    ``recompute``: shares of a layer's matrix products, attention and elementwise operators that the backward
    pass recomputes (default: by ``checkpointing``). ``resharded``: FSDP gathers the weights again
    for the backward pass. ``accumulate_locally``: gradients are reduced after the last micro-batch only.
    ``gradient_bytes``: bytes of an element in the reduction. ``balanced``: the first and the last pipeline
    stage have one layer less. ``tensor_backward``: tensor parallelism's exposed traffic in the backward pass,
    as a share of the forward pass's. ``ends_bytes``: bytes of an element when the embedding and the head are
    gathered. ``chunked_loss``: head and loss are those of ``model/loss.py``; otherwise whole logits.
    ``optimizer``: Muon's processes orthogonalise whole matrices.
    """

    passes: Passes = "compiled"
    recompute: tuple[float, float, float] | None = None
    resharded: bool = True
    accumulate_locally: bool = False
    gradient_bytes: int = 4
    balanced: bool = False
    tensor_backward: float = 1.0
    ends_bytes: int = 4
    chunked_loss: bool = True
    optimizer: Literal["adamw", "muon"] = "adamw"

    def shares(self, checkpointing: Checkpointing) -> tuple[float, float, float]:
        if self.recompute is not None:
            return self.recompute
        return {"none": (0.0, 0.0, 0.0), "selective": (0.0, 0.0, 1.0), "full": (1.0, 1.0, 1.0)}[checkpointing]


@dataclass(frozen=True)
class Step:
    """The seconds of one step by kind; they add up to the step. Communication counts where it is exposed;
    ``hidden`` communication overlaps with computation and is not part of the sum."""

    matmul: float
    attention: float
    elementwise: float
    head: float
    recomputation: float
    tensor: float
    context: float
    sharding: float
    pipeline: float
    bubble: float
    optimizer: float
    hidden: float

    @property
    def seconds(self) -> float:
        return math.fsum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hidden"}


@dataclass(frozen=True)
class Prediction:
    """One layout on one device: the step, memory of the fullest GPU, and figures derived from them."""

    layout: Layout
    step: Step
    memory: Memory
    tokens: int
    flops_full: float
    flops_causal: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return self.tokens / self.step.seconds / self.layout.processes

    def mfu(self, device: Device, causal: bool = False) -> float:
        return self.tokens_per_second * (self.flops_causal if causal else self.flops_full) / device.flops

    def days(self, tokens: float) -> float:
        return tokens / self.tokens * self.step.seconds / 86400


def predict(
    arch: Architecture,
    layout: Layout,
    device: Device,
    length: int,
    constants: Constants = FITTED,
    software: Software | None = None,
) -> Prediction:
    """The cost of ``layout`` with sequences of ``length`` tokens; it must fit ``arch`` (see ``problem``)."""
    model = _Model(arch, layout, device, length, constants, software or Software())
    return Prediction(
        layout,
        model.step(),
        memory(arch, layout, length),
        layout.sequences * length,
        **{f"flops_{kind}": count for kind, count in arch.flops_per_token(length).items()},
    )


@dataclass(frozen=True)
class _Model:
    arch: Architecture
    layout: Layout
    device: Device
    length: int
    constants: Constants
    software: Software

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch in a GPU's matrix products."""
        return self.layout.micro_batch * self.length / self.layout.context

    # Computing -------------------------------------------------------------------------------------------

    def matmul(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of [rows, inner] @ [inner, columns] in bfloat16: the matrix units' time, longer where the
        last wave of output tiles does not fill the device, or the memory's time where that is longer."""
        tiles = math.ceil(rows / 128) * math.ceil(columns / 256)
        waves = math.ceil(tiles / self.device.processors)
        filled = tiles / (waves * self.device.processors)
        computing = 2 * rows * inner * columns / (self.share * filled * self.device.flops)
        moved = 2 * (rows * inner + inner * columns + rows * columns)
        return max(computing, self.moving(moved))

    @property
    def share(self) -> float:
        """Share of the peak, for matrix products that fill the device."""
        return self.constants.ampere if self.device.generation == "ampere" else self.constants.hopper

    def moving(self, size: float) -> float:
        return size / (self.constants.memory * self.device.bandwidth)

    def layer(self) -> tuple[float, float, float]:
        """Seconds of one layer's forward pass: matrix products, attention, elementwise operators."""
        arch, n, t = self.arch, self.tokens, self.layout.tensor
        d, f, a = arch.hidden_size, arch.intermediate_size, arch.attention_size
        # Matrices with the same input are computed together (q, k, v; gate, up).
        products = [
            (d, (a + 2 * arch.kv_size) / t), (a / t, d), (d, (2 if arch.gated else 1) * f / t), (f / t, d),
        ]  # fmt: skip
        matmul = math.fsum(self.matmul(n, inner, columns) for inner, columns in products)
        per_hidden, per_inner = _PASSES[self.software.passes]
        elementwise = self.moving(n / t * (per_hidden * d + per_inner * f))
        return matmul, self.attention(), elementwise

    def attention(self) -> float:
        """Seconds of one layer's forward pass. Context parallelism balances causal work."""
        n, t, d = self.tokens, self.layout.tensor, self.arch.attention_size
        if self.device.attention == "unfused":
            scores = n * self.length * self.arch.heads / t  # all pairs: the mask is applied afterwards
            products = 4 * n * self.length * d / t / (self.share * self.device.flops)
            return products + self.moving(_SCORE_BYTES * scores)
        flops = 2 * n * self.length * d / t  # causal: half of 4 · T² · d
        return flops / (self.device.attention_share * self.device.flops)

    def head(self) -> float:
        """Seconds of head and loss, forward and backward."""
        n, t, arch = self.tokens, self.layout.tensor, self.arch
        products = 3 * self.matmul(n, arch.hidden_size, arch.vocab_size / t)
        if self.software.chunked_loss:
            return products + self.moving(head_bytes(n, arch.vocab_size / t, arch.hidden_size))
        return products + self.moving(_LOGIT_BYTES[self.software.passes] * n * arch.vocab_size / t)

    # Communication ---------------------------------------------------------------------------------------

    def ring(self, size: float, members: int, stride: int) -> float:
        """Seconds to gather (or reduce-scatter) a tensor of ``size`` bytes among ``members`` GPUs whose ranks
        are ``stride`` apart. Rings leave a machine through the adapters of all its members; NCCL has no trees
        for these collectives, so a ring's latency is linear in the members."""
        if members == 1:
            return 0.0
        _, machines, rate = self.group(members, stride)
        latency = (members - machines) * self.device.link_latency
        latency += machines * self.device.network_latency if machines > 1 else 0.0
        return size * (members - 1) / members / rate + latency + _START

    def total(self, size: float, members: int, stride: int) -> float:
        """Seconds to sum a tensor of ``size`` bytes over ``members`` GPUs, as a ring (twice ``ring``) or as a
        tree over the machines, whose latency is logarithmic; NCCL takes what its cost model finds faster."""
        if members == 1:
            return 0.0
        inside, machines, rate = self.group(members, stride)
        ring = 2 * self.ring(size, members, stride) - _START
        if machines == 1:
            return ring
        hops = (inside - 1) * self.device.link_latency
        hops += math.ceil(math.log2(machines)) * self.device.network_latency
        return min(ring, 2 * size / (_TREE * rate) + 2 * hops + _START)

    def group(self, members: int, stride: int) -> tuple[int, int, float]:
        """Members in one machine, machines, and the bytes a second of a ring through all of them."""
        inside = max(1, min(members, self.device.gpus_per_machine // stride))
        machines = math.ceil(members / inside)
        rate = self.device.link if machines == 1 else min(self.device.link, inside * self.device.network)
        return inside, machines, self.constants.network * rate

    def between(self, size: float, stride: int) -> float:
        """Seconds to send ``size`` bytes to the GPU ``stride`` ranks away."""
        near = stride < self.device.gpus_per_machine
        rate = self.device.link if near else self.device.network
        latency = self.device.link_latency if near else self.device.network_latency
        return size / (self.constants.network * rate) + latency

    # The step --------------------------------------------------------------------------------------------

    def step(self) -> Step:
        arch, layout, software = self.arch, self.layout, self.software
        m, stages = layout.accumulate, layout.pipeline
        layers = arch.layers / stages
        matmul, attention, elementwise = self.layer()
        again_matmul, again_attention, again_elementwise = software.shares(layout.checkpointing)
        again = again_matmul * matmul + again_attention * attention + again_elementwise * elementwise
        flash = self.device.attention != "unfused"
        attention_backward = (2.5 if flash else 2.0) * attention  # flash recomputes the scores
        forward = matmul + attention + elementwise
        backward = 2 * matmul + attention_backward + 2 * elementwise + again

        # Tensor parallelism: two gathers and two reductions of a layer's activations, forward and backward.
        activations = 2 * self.tokens * arch.hidden_size
        tensor = 4 * self.ring(activations, layout.tensor, 1)
        tensor_layer = tensor * (1 + software.tensor_backward + again_matmul)

        # Context parallelism: keys and values travel round the ring behind the attention over the present
        # ones. Each round's result is merged in float32 (accumulator read and written, result read), twice
        # backward.
        steps = layout.context - 1
        pairs = 2 * 2 * self.tokens * arch.kv_size / layout.tensor
        hop = self.between(pairs, layout.tensor)
        share = 1 / layout.context
        merge = self.moving(12 * self.tokens * arch.attention_size / layout.tensor)
        context = steps * (max(0.0, hop - attention * share) + merge)
        context_backward = steps * (max(0.0, 2 * hop - attention_backward * share) + 2 * merge)
        context_layer = context * (1 + again_attention) + context_backward

        # FSDP and DDP: gathers and reductions of one layer overlap with the computation of another.
        gather, reduce, first, last = self.traffic()
        behind_forward, behind_backward = forward + tensor, backward + tensor_layer - tensor
        regather = gather if software.resharded and not layout.zero1 else 0.0
        open_forward = layers * max(0.0, gather - behind_forward) + gather
        gathers = 1 if layout.zero1 else m  # ZeRO-1 gathers new parameters once a step
        open_backward = layers * max(0.0, regather + reduce - behind_backward) + reduce
        synced = 1 if software.accumulate_locally else m
        sharding = gathers * (open_forward + first) + synced * (open_backward + last)
        traffic = gathers * (layers * (gather + regather) + first) + synced * (layers * reduce + last)
        hidden = max(0.0, traffic - sharding)
        if layout.shard > 1:
            sharding += m * layers * self.moving(_COPIED_BYTES * arch.layer_parameters / layout.tensor)

        # The slowest pipeline stage sets the pace: the last, which has the head too.
        head = self.head()
        every = forward + backward + tensor_layer + context_layer
        one = math.ceil(layers) * every if software.balanced else layers * every + head
        idle = (stages - 1) / layout.virtual_stages
        send = self.between(activations / layout.tensor, layout.tensor * layout.context * layout.data)
        pipeline = 2 * (stages - 1 + m * (layout.virtual_stages - 1)) * send if stages > 1 else 0.0

        owned = (layers * arch.layer_parameters + arch.end_parameters / stages) / layout.tensor
        states = owned / (layout.data * layout.context if layout.zero1 else layout.sharded_over)
        return Step(
            matmul=m * layers * 3 * matmul,
            attention=m * layers * (attention + attention_backward),
            elementwise=m * layers * 3 * elementwise,
            head=m * (one - layers * every),
            recomputation=m * layers * again,
            tensor=m * layers * tensor_layer,
            context=m * layers * context_layer,
            sharding=sharding,
            pipeline=pipeline,
            bubble=idle * one,
            optimizer=self.optimizer(states, layers),
            hidden=hidden,
        )

    def optimizer(self, states: float, layers: float) -> float:
        """Seconds of the optimizer's step on ``states`` parameters of a process, in ``layers`` layers."""
        seconds = self.moving(36 * states)  # AdamW: parameters and moments both ways, gradients thrice
        if self.software.optimizer == "adamw":
            return seconds
        # Muon: every process gathers each of the layers' matrices in float32 and iterates on it.
        arch, layout = self.arch, self.layout
        group = layout.sharded_over * layout.tensor
        gather = self.ring(4 * arch.layer_parameters, group, 1) * layers
        iterations = math.fsum(self.iterations(*sorted(shape)) for shape in arch.matrices)
        return seconds + gather + layers * iterations

    def iterations(self, rows: float, columns: float) -> float:
        """Seconds of Muon's five Newton-Schulz iterations on a matrix of rows <= columns."""
        gram, square = self.matmul(rows, columns, rows), self.matmul(rows, rows, rows)
        return 5 * (gram + square + self.matmul(rows, rows, columns))

    def traffic(self) -> tuple[float, float, float, float]:
        """Seconds to gather a layer's weights and to reduce its gradients, and the same for the embedding and
        the head, which are exposed."""
        arch, layout, software = self.arch, self.layout, self.software
        size = arch.layer_parameters / layout.tensor
        ends = arch.end_parameters / layout.tensor / layout.pipeline
        grad, group, copies = software.gradient_bytes, layout.shard * layout.context, layout.replicate
        if layout.shard == 1:
            members = copies * layout.context
            if layout.zero1:  # gradients are scattered, and new parameters gathered behind the next forward
                reduce, last = (self.ring(grad * part, members, layout.tensor) for part in (size, ends))
                gather, first = (self.ring(2 * part, members, layout.tensor) for part in (size, ends))
                return gather, reduce, first, last
            reduce, last = (self.total(grad * part, members, layout.tensor) for part in (size, ends))
            return 0.0, reduce, 0.0, last
        gather = self.ring(2 * size, group, layout.tensor)
        first = self.ring(software.ends_bytes * ends, group, layout.tensor)
        reduce, last = (
            self.ring(grad * part, group, layout.tensor)
            + self.total(grad * part / group, copies, layout.tensor * group)
            for part in (size, ends)
        )
        return gather, reduce, first, last

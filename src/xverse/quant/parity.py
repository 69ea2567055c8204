"""What quantising costs, measured during the run: hidden states and logits of both models compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.model import FullCausal, XverseForCausalLM

_LOGIT_BYTES = 128 * 2**20  # float32 logits of one model held at a time


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """A quantised model compared with its source on ``tokens`` tokens; without tokens the figures are None.

    ``kl`` is the mean KL(source ‖ quantised) in nats, ``top1`` the share of positions where both choose the
    same token, ``layer_errors`` ‖quantised - source‖ / ‖source‖ of the hidden states after each layer.
    ``noise`` is the standard error of the relative rise in perplexity. Bytes are those of the stored tensors.
    """

    tokens: int
    kl: float | None
    perplexity_source: float | None
    perplexity_quantized: float | None
    noise: float | None
    top1: float | None
    layer_errors: tuple[float, ...]
    bytes_source: int
    bytes_quantized: int

    @property
    def delta_perplexity(self) -> float | None:
        """The rise in perplexity as a share of the source's."""
        if self.perplexity_source is None or self.perplexity_quantized is None:
            return None
        return self.perplexity_quantized / self.perplexity_source - 1

    def describe(self) -> list[str]:
        """The report as lines of text."""
        sizes = (
            f"{self.bytes_source / 1e9:.3f} → {self.bytes_quantized / 1e9:.3f} GB "
            f"({self.bytes_source / self.bytes_quantized:.2f} times smaller)"
        )
        if self.kl is None or self.top1 is None or self.delta_perplexity is None:
            return [f"size {sizes}", "parity not measured: no text was given"]
        worst = max(range(len(self.layer_errors)), key=self.layer_errors.__getitem__)
        return [
            f"size {sizes}",
            f"parity on {self.tokens} tokens: KL {self.kl:.5f} nats, perplexity "
            f"{self.perplexity_source:.3f} → {self.perplexity_quantized:.3f} ({self.delta_perplexity:+.2%}), "
            f"same first choice {self.top1:.1%}",
            f"error of the hidden states: {self.layer_errors[0]:.2%} after the first layer, "
            f"{self.layer_errors[-1]:.2%} after the last, largest {self.layer_errors[worst]:.2%} "
            f"(layer {worst})",
        ]


class LogitFigures:
    """KL, perplexities and agreement, summed over batches of logits."""

    def __init__(self) -> None:
        self.tokens = self.targets = 0
        self._kl = self._source = self._quantized = self._squares = self._same = 0.0

    def add(self, source: Tensor, quantized: Tensor, targets: Tensor) -> None:
        """Adds logits [N, V] of both models; ``targets`` int64 [N]: the next tokens, -100 for none."""
        log_p, log_q = source.float().log_softmax(1), quantized.float().log_softmax(1)
        self.tokens += len(targets)
        self._same += (log_p.argmax(1) == log_q.argmax(1)).sum().item()
        known = targets >= 0
        at = targets[known][:, None]
        self.targets += len(at)
        target_p, target_q = log_p[known].gather(1, at).double(), log_q[known].gather(1, at).double()
        self._source -= target_p.sum().item()
        self._quantized -= target_q.sum().item()
        self._squares += (target_p - target_q).square().sum().item()
        self._kl += log_p.exp().mul_(log_p - log_q).sum(1).double().sum().item()

    def report(
        self, layer_errors: tuple[float, ...] = (), bytes_source: int = 0, bytes_quantized: int = 0
    ) -> ParityReport:
        """The figures so far; perplexities are None without a target."""
        noise = None
        if self.targets > 1:
            mean = (self._quantized - self._source) / self.targets
            noise = math.sqrt(max(0.0, self._squares / self.targets - mean**2) / (self.targets - 1))
        return ParityReport(
            tokens=self.tokens,
            kl=self._kl / self.tokens if self.tokens else None,
            perplexity_source=math.exp(self._source / self.targets) if self.targets else None,
            perplexity_quantized=math.exp(self._quantized / self.targets) if self.targets else None,
            noise=noise,
            top1=self._same / self.tokens if self.tokens else None,
            layer_errors=layer_errors,
            bytes_source=bytes_source,
            bytes_quantized=bytes_quantized,
        )


@torch.no_grad()
def compare(source: XverseForCausalLM, quantized: XverseForCausalLM, tokens: Tensor) -> LogitFigures:
    """The figures of two whole models on ``tokens`` int64 [n, T]."""
    figures = LogitFigures()
    size = rows_at_once(source.config.vocab_size)
    for rows in tokens.split(max(1, size // tokens.shape[1])):
        context = FullCausal(len(rows), rows.shape[1], rows.device)
        logits = [model(rows, context).flatten(0, 1) for model in (source, quantized)]
        figures.add(logits[0], logits[1], next_tokens(rows).flatten())
    return figures


def next_tokens(tokens: Tensor) -> Tensor:
    """The token after each token of rows int64 [n, T] → int64 [n, T]; -100 after the last of a row."""
    return torch.cat((tokens[:, 1:], tokens.new_full((len(tokens), 1), -100)), dim=1)


def rows_at_once(vocab_size: int) -> int:
    """The number of tokens whose logits to compute at a time."""
    return max(1, _LOGIT_BYTES // (4 * vocab_size))


def relative_error(source: Tensor, quantized: Tensor) -> float:
    """‖quantised - source‖ / ‖source‖ of tensors [...]."""
    return ((quantized - source).norm() / source.norm().clamp(min=1e-30)).item()

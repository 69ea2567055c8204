"""Speculative decoding: a proposer suggests tokens, and one forward pass of the model verifies them.

A proposal is one token per position, not a distribution. The model's token is chosen at each position as
usual; while it equals the proposed one, the next position has been computed as well. The reply, greedy or
sampled, is therefore exactly the one without speculation (the rule of Leviathan et al., 2023,
arXiv:2211.17192, for proposals with probability 1).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from xverse.config import UserError
from xverse.engine.cache import BLOCK_SIZE
from xverse.engine.proposers import DraftModelProposer, NgramProposer, Proposer
from xverse.engine.scheduler import Scheduler, Work
from xverse.engine.sequence import Sequence
from xverse.model.transformer import XverseForCausalLM
from xverse.tokenizer import Tokenizer

MOST_TOKENS = 16
# The cost of one more row, as a share of a step of one row: weights are read once for all rows, keys and
# values partly again. PyTorch's CPU products are slower from the second row on, but not much slower at the
# eighth (measurements in docs/LOG.md).
_ROW_COST, _ROW_READS, _PLAIN_SECOND_ROW = 0.02, 0.4, 0.5
_SMOOTHING = 0.1  # weight of one verified token in the running mean of acceptance
_PRIOR = 0.8  # acceptance assumed at first
_SHARING = 0.05  # weight of one verification in the prior of new sequences
_FORGETTING = 0.02  # return to the prior per step without a proposal, so that proposing is retried


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to propose tokens: from the text itself (n-gram lookup), or with a small ``draft`` model.

    At most ``max_tokens`` are proposed; the number adapts to how many are accepted. On a CPU with INT4
    weights steps of up to 6 rows take about as long as one row, 8 rows 1.4 times as long. Raises UserError
    for a value out of range, or a draft without its tokenizer.
    """

    draft: XverseForCausalLM | None = None
    draft_tokenizer: Tokenizer | None = None
    max_tokens: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UserError(f"max_tokens: {self.max_tokens} is out of range (1 to {MOST_TOKENS})")
        if (self.draft is None) != (self.draft_tokenizer is None):
            raise UserError("draft: give both the draft model and its tokenizer")


class Speculator:
    """Decides how many tokens to propose for each sequence of an engine, and counts accepted ones.

    ``position_bytes`` is the size of one cache position; ``native`` tells whether kernels compute a few rows
    in about the time of one. Raises UserError for a draft with another tokenizer.
    """

    def __init__(
        self,
        speculation: Speculation,
        model: XverseForCausalLM,
        tokenizer: Tokenizer,
        *,
        cache_tokens: int,
        max_batch: int,
        prefill_chunk: int,
        position_bytes: int,
        native: bool,
        rows_at_once: int,
    ) -> None:
        self.proposer: Proposer = NgramProposer()
        self._weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        if speculation.draft is not None and speculation.draft_tokenizer is not None:
            other = speculation.draft_tokenizer
            if other.hash != tokenizer.hash:
                raise UserError(
                    f"draft: its tokenizer ({other.vocab_size} tokens) differs from the model's "
                    f"({tokenizer.vocab_size} tokens); use a draft with the same tokenizer"
                )
            draft = speculation.draft
            self.proposer = DraftModelProposer(
                draft,
                sum(tensor.nbytes for tensor in draft.state_dict().values()) / self._weight_bytes,
                device=model.model.norm.weight.device,
                blocks=-(-cache_tokens // BLOCK_SIZE) + max_batch,
                sequences=max_batch,
                vocab_size=tokenizer.vocab_size,
                prefill_chunk=prefill_chunk,
            )
        self.proposed = self.accepted = 0
        self.acceptance = _PRIOR  # initial value of a new sequence
        self._most = speculation.max_tokens
        self._rows_at_once = rows_at_once
        self._second_row = 0.0 if native else _PLAIN_SECOND_ROW
        self._position_bytes = position_bytes

    def propose(self, work: list[Work], scheduler: Scheduler) -> None:
        """Add proposed tokens to decoding sequences, unless the step has many rows already."""
        room = self._rows_at_once // len(work) - 1
        if room < 1 or any(item.count > 1 for item in work):
            return
        chosen: list[tuple[Work, int]] = []
        for item in work:
            sequence = item.sequence
            left = sequence.most_tokens - len(sequence.tokens) - 1
            count = 0
            if not sequence.scoring and not item.forced:
                cache = self._position_bytes * len(sequence.tokens)
                share = cache / (cache + self._weight_bytes)  # of the bytes that a step reads
                cost = self.proposer.cost + _ROW_COST + _ROW_READS * share
                most = min(self._most, room, left)
                count = best_count(sequence.acceptance, cost, most, self._second_row)
            if count > 0:
                chosen.append((item, count))
            else:
                learn(sequence, 0, 0)
        proposals = self.proposer.propose([(item.sequence, count) for item, count in chosen])
        for (item, _), tokens in zip(chosen, proposals, strict=True):
            scheduler.propose(item, tokens)

    def verified(self, item: Work, accepted: int) -> None:
        """Record that the first ``accepted`` of the item's proposed tokens were right."""
        if item.proposed:
            self.proposed += len(item.proposed)
            self.accepted += accepted
            learn(item.sequence, len(item.proposed), accepted)
            self.acceptance += _SHARING * (item.sequence.acceptance - self.acceptance)

    def forget(self, sequence: Sequence) -> None:
        """Drop the state of a sequence that has ended."""
        self.proposer.forget(sequence)


def propose_forced(work: list[Work], scheduler: Scheduler, most: int) -> None:
    """Propose the tokens about which constraints leave no choice, ``most`` in all."""
    for item in work:
        sequence, constraint = item.sequence, item.sequence.request.constraint
        left = min(most, sequence.most_tokens - len(sequence.tokens) - 1)
        if constraint is None or sequence.scoring or item.count < sequence.pending or left < 1:
            continue
        with contextlib.suppress(Exception):  # ``allowed`` raises it again and fails this request
            if forced := list(constraint.forced()[:left]):
                scheduler.propose(item, forced)
        item.forced = bool(item.proposed)
        most -= len(item.proposed)


def best_count(acceptance: float, cost: float, most: int, second_row: float = 0.0) -> int:
    """The number of tokens to propose, 0 to ``most``, that maximises tokens per unit of time.

    k proposed tokens, each right with probability a = ``acceptance``, yield (1 - a^(k+1)) / (1 - a) tokens
    (Leviathan et al., equation 1) in the time of 1 + ``second_row`` + k · ``cost`` steps.
    """
    best, best_rate = 0, 1.0
    expected, power = 1.0, 1.0
    for count in range(1, most + 1):
        power *= acceptance
        expected += power
        rate = expected / (1 + second_row + count * cost)
        if rate > best_rate:
            best, best_rate = count, rate
    return best


def learn(sequence: Sequence, proposed: int, accepted: int) -> None:
    """Update the running mean of acceptance after a step."""
    if not proposed:
        sequence.acceptance += _FORGETTING * (_PRIOR - sequence.acceptance)
    for right in [1.0] * accepted + [0.0] * (accepted < proposed):
        sequence.acceptance += _SMOOTHING * (right - sequence.acceptance)

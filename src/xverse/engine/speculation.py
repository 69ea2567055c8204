"""Speculative decoding: tokens are guessed, and one pass of the model verifies several of them at once.

A guess is one token for each place, not a distribution. The model's own next token is chosen in each place as
ever; as long as it is the guessed one, the place behind it has been computed too. So what is chosen, greedily
or by drawing, is exactly what would have been chosen without guesses (the rule of Leviathan et al., 2023,
arXiv:2211.17192, for a proposal that is certain of its token).
"""

from __future__ import annotations

from dataclasses import dataclass

from xverse.config import UserError
from xverse.engine.cache import BLOCK_SIZE
from xverse.engine.proposers import Draft, Lookup, Proposer
from xverse.engine.scheduler import Scheduler, Work
from xverse.engine.sequence import Sequence
from xverse.model.transformer import XverseForCausalLM
from xverse.tokenizer import Tokenizer

MOST_TOKENS = 16
# What one more row costs, as a share of a step of one row: weights are read once for all of them, and of the
# keys and values a part is read again. On a CPU PyTorch's products are slow at the second row, no slower at
# the eighth (docs/LOG.md has the measurements).
_ROW_COST, _ROW_READS, _PLAIN_SECOND_ROW = 0.02, 0.4, 0.5
_SMOOTHING = 0.1  # weight of one verified token in the running mean of acceptance
_HOPE = 0.8  # acceptance that is taken for granted at first
_SHARING = 0.05  # how fast new sequences learn from those before them
_FORGETTING = 0.02  # each step without guesses: after many, hope comes back


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How to guess: from what the text says already (prompt lookup), or with a small ``draft`` model.

    ``max_tokens`` are guessed at most; how many is adapted to how many were right. On a CPU with INT4 weights
    steps of up to 6 rows take about as long as of one, 8 rows 1.4 times as long. Raises UserError where they
    are out of range, or a draft comes without its tokenizer.
    """

    draft: XverseForCausalLM | None = None
    draft_tokenizer: Tokenizer | None = None
    max_tokens: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise UserError(f"max_tokens: {self.max_tokens} guesses are out of range (1 to {MOST_TOKENS})")
        if (self.draft is None) != (self.draft_tokenizer is None):
            raise UserError("draft: a draft model and its tokenizer belong together, one of them is missing")


class Guesser:
    """Guesses for the sequences of one engine, and how many of them were right.

    ``position_bytes`` is what one position of the cache takes; ``native`` says whether kernels compute a few
    rows in about the time of one. Raises UserError for a draft of another tokenizer.
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
        self.proposer: Proposer = Lookup()
        self._weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        if speculation.draft is not None and speculation.draft_tokenizer is not None:
            other = speculation.draft_tokenizer
            if other.hash != tokenizer.hash:
                raise UserError(
                    f"draft: its tokenizer ({other.vocab_size} tokens) is not the model's "
                    f"({tokenizer.vocab_size} tokens): their ids mean different text"
                )
            draft = speculation.draft
            self.proposer = Draft(
                draft,
                sum(tensor.nbytes for tensor in draft.state_dict().values()) / self._weight_bytes,
                blocks=-(-cache_tokens // BLOCK_SIZE) + max_batch,
                sequences=max_batch,
                vocab_size=tokenizer.vocab_size,
                prefill_chunk=prefill_chunk,
            )
        self.proposed = self.accepted = 0
        self.acceptance = _HOPE  # what a new sequence begins with
        self._most = speculation.max_tokens
        self._rows_at_once = rows_at_once
        self._second_row = 0.0 if native else _PLAIN_SECOND_ROW
        self._position_bytes = position_bytes

    def propose(self, work: list[Work], scheduler: Scheduler) -> None:
        """Guesses behind the tokens of sequences that decode, while there are few rows beside them."""
        room = self._rows_at_once // len(work) - 1
        if room < 1 or any(item.count > 1 for item in work):
            return
        asked: list[tuple[Work, int]] = []
        for item in work:
            sequence = item.sequence
            left = sequence.tokens_at_most - len(sequence.tokens) - 1
            count = 0
            if not sequence.scoring:
                cache = self._position_bytes * len(sequence.tokens)
                cost = self.proposer.cost + row_cost(cache / (cache + self._weight_bytes))
                most = min(self._most, room, left)
                count = guesses(sequence.acceptance, cost, most, self._second_row)
            if count > 0:
                asked.append((item, count))
            else:
                learn(sequence, 0, 0)
        found = self.proposer.propose([(item.sequence, count) for item, count in asked])
        for (item, _), tokens in zip(asked, found, strict=True):
            scheduler.propose(item, tokens)

    def verified(self, item: Work, accepted: int) -> None:
        """So many of the item's guesses were right."""
        if item.proposed:
            self.proposed += len(item.proposed)
            self.accepted += accepted
            learn(item.sequence, len(item.proposed), accepted)
            self.acceptance += _SHARING * (item.sequence.acceptance - self.acceptance)

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        self.proposer.forget(sequence)


def row_cost(cache_share: float) -> float:
    """Of one more token in a step, where ``cache_share`` of what a step reads is the sequence's cache."""
    return _ROW_COST + _ROW_READS * cache_share


def guesses(acceptance: float, cost: float, most: int, second_row: float = 0.0) -> int:
    """The number of guesses, 0 to ``most``, with the most tokens for each unit of time.

    Of k guesses, each right with probability ``acceptance``, come (1 - a^(k+1)) / (1 - a) tokens (Leviathan
    et al., equation 1), in 1 + ``second_row`` + k · ``cost`` steps.
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
    """Bring the running mean of acceptance up to date after a step."""
    if not proposed:
        sequence.acceptance += _FORGETTING * (_HOPE - sequence.acceptance)
    for right in [1.0] * accepted + [0.0] * (accepted < proposed):
        sequence.acceptance += _SMOOTHING * (right - sequence.acceptance)

"""Choosing the tokens of a step for all rows together: the host waits for the device once."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.engine.request import TokenLogprob
from xverse.engine.sampling import UNDECIDED, Key, adjust_, draw, greedy, is_greedy, redraw, upload
from xverse.engine.sequence import Sequence

NOT_FINITE = -2  # instead of a token


@dataclass(slots=True)
class Row:
    """A row of logits, from which a token of ``sequence`` is chosen, behind ``proposed`` ones that the same
    step verifies. With a constraint it is ``deferred`` until these are known to be right."""

    sequence: Sequence
    proposed: Many[int] = ()
    allowed: Tensor | None = None  # bool [V], the constraint's
    failure: Exception | None = None  # what the constraint raised

    @property
    def deferred(self) -> bool:
        return self.sequence.request.constraint is not None and bool(self.proposed)

    def ask(self) -> None:
        """Ask the constraint what it allows."""
        constraint = self.sequence.request.constraint
        if constraint is not None and not self.deferred:
            try:
                self.allowed = constraint.allowed()
            except Exception as error:
                self.failure = error


def choose_rows(rows: list[Row], logits: Tensor) -> tuple[list[int], dict[int, TokenLogprob]]:
    """The tokens chosen from ``logits`` [R, V], one for each row: FORBIDDEN if none is allowed, NOT_FINITE if
    the model's logits are not. And the log-probabilities that requests ask for, by row.

    Random numbers are not used up; that depends on how many rows of a sequence turn out to be valid.
    """
    if logits.device.type == "mps":
        logits = logits.float().cpu()  # it has no float64
    greatest, tokens = logits.max(dim=-1)  # [R]; NaN and +inf come through
    groups: dict[Key, list[int]] = {}
    for index, row in enumerate(rows):
        row.ask()
        if not row.sequence.plain and row.failure is None and not row.deferred:
            groups.setdefault(row.sequence.key, []).append(index)
    edited: dict[int, Tensor] = {}
    for group in groups.values():
        found, part = _choose_group([rows[index] for index in group], _rows_of(logits, group, len(rows)))
        edited.update(zip(group, part, strict=True))
        tokens = found if len(group) == len(rows) else tokens.index_copy(0, _upload(group, tokens), found)
    tokens = tokens.where((greatest > -torch.inf) & (greatest < torch.inf), NOT_FINITE)
    wanted = [index for index, row in enumerate(rows) if row.sequence.request.logprobs is not None]
    if not wanted:
        return _decided(tokens.tolist(), rows, edited), {}
    count = max(rows[index].sequence.request.logprobs or 0 for index in wanted)
    scores = _rows_of(logits, wanted, len(rows)).float()
    requests = [rows[index].sequence.request for index in wanted]
    if any(request.tempered for request in requests):
        divisors = [(request.tempered and request.sampling.temperature) or 1.0 for request in requests]
        scores = scores / upload(divisors, torch.float32, logits.device)[:, None]
    logprobs = scores.log_softmax(dim=-1)  # [W, V]
    own = _rows_of(tokens, wanted, len(rows)).clamp(min=0)[:, None]
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)  # [W, A]
    # In one tensor, so that they are read together; float64 holds ids and log-probabilities exactly.
    table = torch.cat((logprobs.gather(-1, own).double(), ids.double(), values.double()), dim=1).flatten()
    read = torch.cat((tokens.double(), table)).tolist()
    before = [int(token) for token in read[: len(rows)]]
    chosen = _decided(list(before), rows, edited)
    by_row: dict[int, TokenLogprob] = {}
    for number, (index, line) in enumerate(zip(wanted, _lines(read[len(rows) :], len(wanted)), strict=True)):
        token, value, half = chosen[index], line[0], 1 + (len(line) - 1) // 2
        if token >= 0 and token != before[index]:
            value = logprobs[number, token].item()
        pairs = zip(map(int, line[1:half]), line[half:], strict=True)
        by_row[index] = TokenLogprob(token, value, tuple(pairs)[: rows[index].sequence.request.logprobs])
    return chosen, by_row


def _lines(values: list[float], count: int) -> list[list[float]]:
    width = len(values) // count
    return [values[start : start + width] for start in range(0, len(values), width)]


def _choose_group(rows: list[Row], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [G] for rows with equal parameters, and the ``logits`` float32 [G, V] that they are drawn
    from, after constraints, biases and penalties."""
    sampling = rows[0].sequence.request.sampling
    adjustments = [row.sequence.adjustment for row in rows]
    masks = [(index, row.allowed) for index, row in enumerate(rows) if row.allowed is not None]
    changed = logits.float()
    if masks or any(adjustments):
        changed = changed.clone() if changed is logits else changed
    if masks:
        mask = upload(torch.stack([allowed for _, allowed in masks]), None, logits.device)  # [C, V]
        at = _upload([index for index, _ in masks], logits)
        changed[at] = changed[at].masked_fill(~mask, -torch.inf)
    if any(adjustments):
        adjust_(changed, sampling, adjustments, [row.proposed for row in rows])
    if is_greedy(sampling):
        return greedy(changed), changed
    dice = []
    for row in rows:
        assert row.sequence.dice is not None
        dice.append(row.sequence.dice[len(row.proposed)])
    return draw(changed, sampling, dice), changed


def _decided(tokens: list[int], rows: list[Row], edited: dict[int, Tensor]) -> list[int]:
    """``tokens`` with those rows drawn again whose candidates did not suffice."""
    for index, token in enumerate(tokens):
        if token == UNDECIDED:
            sequence = rows[index].sequence
            assert sequence.dice is not None
            die = sequence.dice[len(rows[index].proposed)]
            tokens[index] = redraw(edited[index], sequence.request.sampling, die)
    return tokens


def _rows_of(values: Tensor, indices: list[int], count: int) -> Tensor:
    return values if len(indices) == count else values.index_select(0, _upload(indices, values))


def _upload(indices: list[int], like: Tensor) -> Tensor:
    return upload(indices, torch.long, like.device)

"""What a prompt's hidden states give without generating: log-probabilities of its tokens and of continuations
of it, and its embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xverse.config import UserError
from xverse.engine.request import Event, Request, TokenLogprob
from xverse.engine.sequence import Prompted, Sequence

ScoringItem = tuple[Many[int], Many[Many[int]]]  # a prompt and its continuations, as ids

_ROWS_AT_ONCE = 128  # tokens whose logits exist at a time: 51 MB with 100,534 entries


def token_logprob(logprobs: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """``token``'s entry of ``logprobs`` float32 [V], and the ``alternatives`` greatest ones."""
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        values, ids = logprobs.topk(min(alternatives, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), top)


def score_prompt(
    prompted: Prompted, tokens: Many[int], start: int, hidden: Tensor, head: Callable[[Tensor], Tensor]
) -> bool:
    """Add log-probabilities to ``prompted``, from ``hidden`` states [T, D] of the tokens from ``start`` on.

    ``head`` computes logits [T, V]. Returns whether all log-probabilities are finite.
    """
    first = max(prompted.start - 1 - start, 0)  # the state of a token predicts the next one
    for part in hidden[first:].split(_ROWS_AT_ONCE):
        logprobs = head(part).float().log_softmax(dim=-1)  # [R, V]
        at = start + first + 1
        first += len(part)
        targets = tokens[at : at + len(part)]  # one fewer at the end of the prompt
        rows = torch.arange(len(targets), device=logprobs.device)
        chosen = logprobs[rows, torch.tensor(targets, dtype=torch.long, device=logprobs.device)].tolist()
        if not all(value <= 0 for value in chosen):  # NaN compares as False
            return False
        if prompted.alternatives:
            prompted.logprobs += [
                token_logprob(row, token, prompted.alternatives)
                for row, token in zip(logprobs, targets, strict=False)
            ]
        else:
            prompted.logprobs += [TokenLogprob(*pair) for pair in zip(targets, chosen, strict=True)]
        if prompted.finals and at + len(part) > len(tokens):
            prompted.final_logprobs = logprobs[-1, list(prompted.finals)].tolist()
            prompted.final_best = int(logprobs[-1].argmax())
            if not all(value <= 0 for value in prompted.final_logprobs):
                return False
    return True


def pool(prompted: Prompted, hidden: Tensor) -> bool:
    """Add ``hidden`` states [T, D] of a prompt's next tokens to its embedding; returns if it is finite."""
    if prompted.pooling == "last":
        prompted.state = hidden[-1].double()
    else:  # the sum: its direction is the mean's. One token after the other, wherever the prompt is divided.
        rows = hidden.double()
        if prompted.state is not None:
            rows = torch.cat((prompted.state[None], rows))
        prompted.state = rows.cumsum(dim=0)[-1]
    return bool(prompted.state.isfinite().all())


def report(sequence: Sequence, event: Event) -> None:
    """Put what was computed of a prompt into its first event."""
    prompted = sequence.prompted
    assert prompted is not None
    if prompted.state is not None:
        event.embedding = normalize(prompted.state, dim=0).float().tolist()
    else:
        event.prompt_logprobs = prompted.logprobs
    sequence.reported = True


class Scores:
    """The requests that ``Engine.score`` makes from its items, and the results as they arrive.

    Continuations that differ only in their last token share a request: "A", "B", "C", "D" cost one pass.
    With ``if_likeliest``, ``likeliest`` tells whether all tokens of a continuation are the most probable.
    """

    def __init__(
        self, items: Many[ScoringItem], progress: Callable[[int], None] | None, if_likeliest: bool = False
    ) -> None:
        self.results: list[list[list[float]]] = [[[] for _ in texts] for _, texts in items]
        self.likeliest: list[list[bool]] = [[False for _ in texts] for _, texts in items]
        self._alternatives = 1 if if_likeliest else 0
        self.open: dict[int, tuple[int, list[int], Prompted]] = {}
        self._items = items
        self._left = [0] * len(items)
        self._progress = progress
        self._done = 0
        self._next: tuple[int, list[int]] = (0, [])

    def requests(self) -> Iterator[tuple[Request, Prompted]]:
        """The caller submits each request and then calls ``submitted``."""
        for index, (prompt, continuations) in enumerate(self._items):
            stems: dict[tuple[int, ...], list[int]] = {}
            for number, continuation in enumerate(continuations):
                if not len(continuation):
                    raise UserError(f"item {index}: continuation {number} has no tokens")
                stems.setdefault(tuple(continuation[:-1]), []).append(number)
            self._left[index] = len(stems)
            for stem, numbers in stems.items():
                finals = tuple(continuations[number][-1] for number in numbers)
                request = Request(prompt_ids=[*prompt, *stem], prompt_logprobs=0, generate=False)
                self._next = index, numbers
                start = max(len(prompt), 1)
                yield request, Prompted(start=start, alternatives=self._alternatives, finals=finals)

    def submitted(self, handle: int, prompted: Prompted) -> None:
        self.open[handle] = (*self._next, prompted)

    def take(self, event: Event) -> None:
        """Take the only event of one of the requests. Raises UserError if it failed."""
        index, numbers, prompted = self.open.pop(event.handle)
        if event.error:
            raise UserError(f"item {index}: {event.error}")
        stem = [token.logprob for token in prompted.logprobs]
        likeliest = all(token.top and token.top[0][0] == token.token_id for token in prompted.logprobs)
        for number, token, final in zip(numbers, prompted.finals, prompted.final_logprobs, strict=True):
            self.results[index][number] = [*stem, final]
            self.likeliest[index][number] = likeliest and token == prompted.final_best
        self._left[index] -= 1
        if not self._left[index]:
            self._done += 1
            if self._progress is not None:
                self._progress(self._done)

"""Items to token ids and loss masks, cut to length by rule, split by seed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xverse.config import UserError
from xverse.data.dialogues.conversations import Preference, to_dialogue, to_preference, to_text
from xverse.data.dialogues.instructions import Skip
from xverse.data.order import random_order
from xverse.finetune.settings import Settings
from xverse.finetune.sources import Source, find_sources, read_source
from xverse.log import notice
from xverse.tokenizer import Tokenizer, encode_dialogue
from xverse.tokenizer.chat import message_ids

Message = Mapping[str, str]
FIRST = 64  # of a stream: what a run that goes on knows its data by


@dataclass(frozen=True)
class Example:
    """``ids`` and, for each, whether it has loss. ``name`` says where it came from, for messages."""

    ids: list[int]
    mask: list[bool]
    name: str


@dataclass
class Data:
    """The examples to train on, those held out or of ``eval_dataset``, and what was read."""

    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_data(settings: Settings, tokenizer: Tokenizer, length: int, quiet: bool = False) -> Data:
    """Read, encode and split what ``settings`` name; examples have at most ``length`` tokens.

    Says what was left out and cut. Raises UserError for unknown datasets and columns, and where nothing
    usable is found.
    """
    data = Data()

    def read(names: str) -> list[Example]:
        found: list[Example] = []
        for source in find_sources(names, settings.dataset_dir):
            examples, note = _read(source, settings, tokenizer, length)
            data.notes.append(note)
            if not quiet:
                notice(note)
            found += examples
        return found

    if settings.dataset:
        examples = read(settings.dataset)
        held_out = settings.held_out(len(examples))
        order = random_order(len(examples), "split", settings.seed).tolist()
        data.valid = [examples[i] for i in sorted(order[:held_out])]
        data.train = [examples[i] for i in sorted(order[held_out:])]
        if held_out:
            asked = "val_size" if settings.val_size else "no validation set named"
            data.notes.append(f"{held_out} of {len(examples)} examples held out ({asked})")
            if not quiet:
                notice(data.notes[-1])
    if settings.eval_dataset:
        data.valid = read(settings.eval_dataset)
    return data


def _read(source: Source, settings: Settings, tokenizer: Tokenizer, length: int) -> tuple[list[Example], str]:
    skipped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    examples = list(iterate(source, settings, tokenizer, length, skipped, cut))
    note = f"{source.name}: {len(examples)} examples"
    if skipped:
        note += f"; skipped {skipped.total()}: " + ", ".join(f"{n} {why}" for why, n in skipped.most_common())
    if cut:
        note += f"; over {length} tokens: " + ", ".join(f"{n} {what}" for what, n in cut.items())
    if not examples:
        raise UserError(f"{note}; nothing to train on")
    return examples, note


def iterate(
    source: Source,
    settings: Settings,
    tokenizer: Tokenizer,
    length: int,
    skipped: Counter[str],
    cut: Counter[str],
) -> Iterator[Example]:
    """The examples of a source as they are read; what is left out or cut is counted by reason."""
    count = 0
    for number, (item, info) in enumerate(read_source(source, settings.stage, skipped)):
        if settings.max_samples is not None and count >= settings.max_samples:
            return
        name = f"{source.name}[{number}]"
        try:
            if settings.stage == "pt":
                ids = [*tokenizer.encode(to_text(item, info)), tokenizer.eos_id]
                # A document longer than a row goes on in further ones.
                for start in range(0, len(ids), length):
                    part = ids[start : start + length]
                    if len(part) > 1:
                        count += 1
                        yield Example(part, [False] + [True] * (len(part) - 1), name)
                continue
            messages = to_dialogue(item, info).messages
        except Skip as reason:
            skipped[str(reason)] += 1
            continue
        ids, mask, what = encode_within(tokenizer, messages, length)
        if what:
            cut[what] += 1
        if settings.train_on_prompt:
            mask = [False] + [True] * (len(ids) - 1)
        elif settings.mask_history:
            mask = _last_only(mask)
        count += 1
        yield Example(ids, mask, name)


def stream_data(
    settings: Settings, tokenizer: Tokenizer, length: int
) -> tuple[Data, Callable[[], Iterator[Example]]]:
    """``--streaming``: the first ``val_size`` examples held out, or ``eval_dataset``, and a function that
    reads all others from the beginning. Raises UserError where the first files hold nothing usable."""
    assert settings.dataset is not None
    sources = find_sources(settings.dataset, settings.dataset_dir)
    held_out = int(settings.val_size)

    def read() -> Iterator[Example]:
        for source in sources:
            yield from iterate(source, settings, tokenizer, length, Counter(), Counter())

    first = list(itertools.islice(read(), held_out + FIRST))
    if len(first) <= held_out:
        raise UserError(
            f"{settings.dataset}: {len(first)} usable examples, and {held_out} are to be held out"
        )
    data = Data(train=first[held_out:], valid=first[:held_out])
    data.notes.append(f"{settings.dataset}: streamed; the first {held_out} examples held out")
    if settings.eval_dataset:
        for source in find_sources(settings.eval_dataset, settings.dataset_dir):
            examples, note = _read(source, settings, tokenizer, length)
            data.valid += examples
            data.notes.append(note)
    return data, lambda: itertools.islice(read(), held_out, None)


def encode_within(
    tokenizer: Tokenizer, messages: Sequence[Message], length: int
) -> tuple[list[int], list[bool], str]:
    """A dialogue of at most ``length`` tokens as ids and loss mask, and what was cut (empty: nothing).

    What gives way, in this order: the oldest rounds, as in chat; the end of the last question; the system
    message; the end of the last answer, which then has no end marker either.
    """
    ids, mask = encode_dialogue(tokenizer, messages)
    if len(ids) <= length:
        return ids, mask, ""
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    while len(turns) > 2:
        turns = turns[2:]
        ids, mask = _join(tokenizer, [*system, *turns])
        if len(ids) <= length:
            return ids, mask, "lost their oldest rounds"
    (asked, question), (replied, answer) = (message_ids(tokenizer, message) for message in turns)
    before = [token for message in system for part in message_ids(tokenizer, message) for token in part]
    room = length - len(before) - len(asked) - len(replied) - len(answer)
    if room < 1:
        room += len(before)
        before = []
    question = question[: max(1, room)]
    prompt = before + asked + question + replied
    answer = answer[: length - len(prompt)]
    if not answer:
        raise UserError(f"cutoff_len {length} leaves no room for an answer")
    what = "had the last question cut" if room >= 1 else "had question and answer cut"
    return prompt + answer, [False] * len(prompt) + [True] * len(answer), what


def _join(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """As ``encode_dialogue``, for what may begin with the result of a tool."""
    ids: list[int] = []
    mask: list[bool] = []
    for message in messages:
        prefix, content = message_ids(tokenizer, message)
        ids += prefix + content
        mask += [False] * len(prefix) + [message["role"] == "assistant"] * len(content)
    return ids, mask


def _last_only(mask: list[bool]) -> list[bool]:
    """Loss on the last run of it alone."""
    start = len(mask)
    while start and mask[start - 1]:
        start -= 1
    return [False] * start + mask[start:]


def load_pairs(settings: Settings, tokenizer: Tokenizer, length: int, quiet: bool = False) -> Data:
    """Preference pairs as ``load_data`` reads single examples. The chosen answer and the rejected one to each
    prompt are neighbours in the lists: a dialogue each, with loss on the last answer."""
    data = Data()

    def read(names: str) -> list[list[Example]]:
        pairs: list[list[Example]] = []
        for source in find_sources(names, settings.dataset_dir):
            skipped: Counter[str] = Counter()
            before = len(pairs)
            for number, (item, info) in enumerate(read_source(source, "dpo", skipped)):
                if settings.max_samples is not None and len(pairs) - before >= settings.max_samples:
                    break
                try:
                    preference = to_preference(item, info)
                except Skip as reason:
                    skipped[str(reason)] += 1
                    continue
                pairs.append(_encode_pair(tokenizer, preference, length, f"{source.name}[{number}]"))
            note = f"{source.name}: {len(pairs) - before} pairs"
            if skipped:
                note += "; skipped " + ", ".join(f"{n} {why}" for why, n in skipped.most_common())
            data.notes.append(note)
            if len(pairs) == before:
                raise UserError(f"{note}; nothing to train on")
        return pairs

    def flat(pairs: Sequence[list[Example]]) -> list[Example]:
        return [side for pair in pairs for side in pair]

    if settings.dataset:
        pairs = read(settings.dataset)
        order = random_order(len(pairs), "split", settings.seed).tolist()
        held_out = settings.held_out(len(pairs))
        data.valid = flat([pairs[i] for i in sorted(order[:held_out])])
        data.train = flat([pairs[i] for i in sorted(order[held_out:])])
        if held_out:
            data.notes.append(f"{held_out} of {len(pairs)} pairs held out")
    if settings.eval_dataset:
        data.valid = flat(read(settings.eval_dataset))
    if not quiet:
        for note in data.notes:
            notice(note)
    return data


def _encode_pair(tokenizer: Tokenizer, pair: Preference, length: int, name: str) -> list[Example]:
    sides = []
    for answer in (pair.chosen, pair.rejected):
        messages = [*pair.messages, {"role": "assistant", "content": answer}]
        ids, mask, _ = encode_within(tokenizer, messages, length)
        sides.append(Example(ids, _last_only(mask), name))
    return sides

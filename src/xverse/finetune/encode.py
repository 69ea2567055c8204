"""Items to token ids and loss masks, cut to length by rule, split by seed."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xverse.config import UserError
from xverse.data.dialogues.formats import (
    DatasetInfo,
    Messages,
    Preference,
    Skip,
    fill_placeholders,
    is_undesirable,
    to_dialogue,
    to_preference,
    to_prompt,
    to_text,
)
from xverse.data.order import random_order
from xverse.finetune.dialogue import encode_within
from xverse.finetune.rewards import rules_of
from xverse.finetune.settings import Settings
from xverse.finetune.sources import Source, SourceFile, find_sources, read_file, source_files
from xverse.log import notice
from xverse.tokenizer import Tokenizer, encode_chat

CHECKED = 1_000  # items of a stream after which the share of unusable ones is looked at
FIRST = 64  # examples of a stream that identify its data when a run is resumed


@dataclass(frozen=True)
class Example:
    """``ids`` and, for each, whether it has loss. ``name`` is its origin, such as ``alpaca_en[17]``.
    ``desirable``: in stage kto, whether the reply is tagged as good. ``margin``: in stage rm, of a pair's
    chosen reply."""

    ids: list[int]
    mask: list[bool]
    name: str
    desirable: bool | None = None
    margin: float = 0.0

    @property
    def dataset(self) -> str:
        return self.name.rpartition("[")[0]


@dataclass(frozen=True)
class Prompt(Example):
    """The beginning of a dialogue, which has no loss: the model replies. ``columns`` are those of its item,
    from which rewards are computed, ``text`` the last message."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


Group = list[Example]  # examples that stay neighbours: one, or a preference pair's chosen and rejected reply


@dataclass
class Data:
    """The examples to train on, those held out or of ``eval_dataset``, and what the reader reported.

    With ``replay``: also ``languages``, held-out text of each, and ``bits``, its bits per byte ``before`` and
    ``after``.
    """

    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    languages: list[Example] = field(default_factory=list)
    bits: dict[str, dict[str, float]] = field(default_factory=dict)


class Unwanted(Skip):
    """An item that a setting leaves out."""


class UnfilledPlaceholder(UserError):
    """An item has ``{{placeholders}}`` that ``identity`` does not fill."""


def load_data(settings: Settings, tokenizer: Tokenizer, length: int, quiet: bool = False) -> Data:
    """Read, encode and split the datasets of ``settings``; examples have at most ``length`` tokens.

    In stages dpo and rm the chosen reply and the rejected one to each prompt are neighbours in the lists.
    Reports what was skipped and cut. Raises UserError for unknown datasets and columns, for unfilled
    placeholders and for a dataset without a usable example.
    """
    data = Data()
    reader = _Reader(settings, tokenizer, length, data.notes)
    if settings.dataset:
        sources = find_sources(settings.dataset, settings.dataset_dir)
        groups = [(group, source.use.repeat) for source in sources for group in reader.source(source)]
        held_out = settings.held_out(len(groups))
        order = random_order(len(groups), "split", settings.seed).tolist()
        data.valid = _flat(groups[i][0] for i in sorted(order[:held_out]))
        train = [groups[i] for i in sorted(order[held_out:])]
        data.train = _flat(group for group, repeat in train for _ in range(repeat))
        if held_out:
            reason = "val_size" if settings.val_size else "no validation set named"
            data.notes.append(f"{held_out} of {len(groups)} {reader.unit} held out ({reason})")
    if settings.eval_dataset:
        sources = find_sources(settings.eval_dataset, settings.dataset_dir)
        data.valid = _flat(group for source in sources for group in reader.source(source))
    if not quiet:
        for note in data.notes:
            notice(note)
    return data


def stream_data(
    settings: Settings, tokenizer: Tokenizer, length: int
) -> tuple[Data, Callable[[], Iterator[Example]]]:
    """With ``streaming``: the first ``val_size`` examples held out, or ``eval_dataset``, and a function that
    reads all others from the beginning. Raises UserError if the first files have no usable example."""
    data = Data()
    reader = _Reader(settings, tokenizer, length, data.notes)
    sources = find_sources(settings.dataset, settings.dataset_dir)
    names = ", ".join(source.name for source in sources)
    held_out = int(settings.val_size)

    def read() -> Iterator[Example]:
        for source in sources:
            for group in reader.stream(source):
                yield from group

    first = list(itertools.islice(read(), held_out + FIRST))
    if len(first) <= held_out:
        raise UserError(f"{names}: {len(first)} usable examples, and {held_out} are to be held out")
    data.train, data.valid = first[held_out:], first[:held_out]
    data.notes.append(f"{names}: streamed; the first {held_out} examples held out")
    for source in find_sources(settings.eval_dataset, settings.dataset_dir):
        data.valid += _flat(reader.source(source))
    return data, lambda: itertools.islice(read(), held_out, None)


def _flat(groups: Iterable[Group]) -> list[Example]:
    return list(itertools.chain.from_iterable(groups))


@dataclass
class _Counts:
    """Items that were skipped and examples that were cut, by reason; KTO's undesirable replies."""

    skipped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    undesirable: int = 0
    used: int = 0
    unwanted: int = 0  # of the skipped ones: by a setting, not because they are unusable

    def note(self, text: str, length: int) -> str:
        if self.skipped:
            reasons = ", ".join(f"{n} {why}" for why, n in self.skipped.most_common())
            text += f"; skipped {self.skipped.total()}: {reasons}"
        if self.cut:
            text += f"; over {length} tokens: " + ", ".join(f"{n} {what}" for what, n in self.cut.items())
        if self.undesirable:
            text += f"; {self.undesirable} replies are tagged undesirable and used like the others"
        return text

    def check(self, name: str, most: float) -> None:
        """Raise UserError if more than the share ``most`` of the items seen so far is unusable."""
        bad = self.skipped.total() - self.unwanted
        if bad > most * (bad + self.used):
            reasons = ", ".join(f"{n} {why}" for why, n in self.skipped.most_common())
            raise UserError(
                f"{name}: {bad:,} of {bad + self.used:,} items cannot be used ({reasons}), more than "
                f"max_bad_share {most:g} allows; fix the data, or raise max_bad_share to leave them out"
            )

    def add(self, other: _Counts) -> None:
        self.skipped += other.skipped
        self.used += other.used
        self.unwanted += other.unwanted


class _Reader:
    """Datasets to encoded groups. ``notes`` collects a line for each dataset, or file of a local folder."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, length: int, notes: list[str]) -> None:
        self.settings, self.tokenizer, self.length, self.notes = settings, tokenizer, length, notes
        self.unit = "pairs" if settings.stage in ("dpo", "rm") else "examples"
        self.rules = rules_of(settings) if settings.stage == "grpo" else ()

    def source(self, source: Source) -> list[Group]:
        """All groups of a dataset. Raises UserError if there are none."""
        groups: list[Group] = []
        counts, total, local = _Counts(), _Counts(), False
        for file in source_files(source):
            before, local = len(groups), file.in_folder
            if self.settings.max_samples is not None and before >= self.settings.max_samples:
                break
            if local:
                counts = _Counts()
            try:
                groups += list(self._file(file, counts, before))
            except UserError as error:
                if not local or isinstance(error, UnfilledPlaceholder):
                    raise
                self.notes.append(f"skipped {error}")
                continue
            if local:
                note = f"{file.name}: {len(groups) - before} {self.unit}"
                self.notes.append(counts.note(note, self.length))
                total.add(counts)
        note = counts.note(f"{source.name}: {len(groups)} {self.unit}", self.length)
        if not groups:
            raise UserError(f"{note}; nothing to train on")
        (total if local else counts).check(source.name, self.settings.max_bad_share)
        if self.settings.stage == "kto":
            groups = mismatched(groups, self.length)
        if not local:
            self.notes.append(note)
        return groups

    def stream(self, source: Source) -> Iterator[Group]:
        """The groups of a dataset as they are needed, in the order of its files."""
        count, counts = 0, _Counts()
        for file in source_files(source):
            for group in self._file(file, counts, count):
                count += 1
                yield group
                if counts.used % CHECKED == 0:
                    counts.check(source.name, self.settings.max_bad_share)
        counts.check(source.name, self.settings.max_bad_share)

    def _file(self, file: SourceFile, counts: _Counts, before: int) -> Iterator[Group]:
        """The groups of one file, up to num_samples, and with the ``before`` read already to max_samples."""
        limits = [file.source.use.num_samples or file.source.info.num_samples]
        items: Iterable[tuple[int, tuple[Any, DatasetInfo]]]
        items = enumerate(read_file(file, self.settings.stage, counts.skipped))
        if limits[0] is not None and not self.settings.streaming:
            rows = list(items)
            order = random_order(len(rows), "samples", self.settings.seed, file.path.name).tolist()
            items = (rows[i] for i in order)
        if self.settings.max_samples is not None:
            limits.append(self.settings.max_samples - before)
        limit = min((n for n in limits if n is not None), default=None)
        count = 0
        for number, (item, info) in items:
            if limit is not None and count >= limit:
                return
            try:
                groups = self._encode(item, info, file, number, counts)
            except Skip as reason:
                counts.skipped[str(reason)] += 1
                counts.unwanted += isinstance(reason, Unwanted)
                continue
            count += len(groups)
            counts.used += 1
            yield from groups

    def _encode(
        self, item: Any, info: DatasetInfo, file: SourceFile, number: int, counts: _Counts
    ) -> list[Group]:
        """The examples of an item: one, a pair, or the parts of a text. Raises Skip for an unusable item."""
        if self.settings.stage == "pt":
            return self._text(to_text(item, info), f"{file.name}[{number}]")
        if self.settings.stage == "grpo":
            return [[self._prompt(item, info, file, number, counts)]]
        if self.settings.stage in ("dpo", "rm"):
            return [self._pair(to_preference(item, info), file, number)]
        example = self._dialogue(to_dialogue(item, info), file, number, counts)
        undesirable = is_undesirable(item, info)
        if self.settings.stage == "kto":
            return [[dataclasses.replace(example, desirable=not undesirable)]]
        counts.undesirable += undesirable
        return [[example]]

    def _text(self, text: str, name: str) -> list[Group]:
        end = [self.tokenizer.eos_id] if self.tokenizer.eos_id >= 0 else []
        ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(text), *end]
        parts = [ids[start : start + self.length] for start in range(0, len(ids), self.length)]
        return [[Example(part, [False] + [True] * (len(part) - 1), name)] for part in parts if len(part) > 1]

    def _pair(self, pair: Preference, file: SourceFile, number: int) -> Group:
        messages = self._filled(pair.messages, file, number)
        group = []
        for text in (pair.chosen, pair.rejected):
            reply = self._filled([{"role": "assistant", "content": text}], file, number)
            ids, mask, _ = self._encoded(messages + reply, True, file, number)
            group.append(Example(ids, mask, f"{file.name}[{number}]", margin=pair.margin))
        return group

    def _prompt(self, item: Any, info: DatasetInfo, file: SourceFile, number: int, counts: _Counts) -> Prompt:
        messages, answer = to_prompt(item, info)
        columns = {**item, "answer": item.get("answer", answer)}
        for rule in self.rules:
            if missing := rule.missing(columns):
                raise Skip(missing)
        most = self.settings.max_completion_length
        messages = self._filled(messages, file, number)
        try:
            prompt = encode_chat(
                self.tokenizer,
                messages,
                max_new_tokens=most,
                max_positions=self.length,
                truncation=self.length - most,
            )
        except UserError as error:  # a template's last turn cannot be cut
            raise Skip(str(error)) from None
        if prompt.dropped_rounds or prompt.cut_tokens:
            counts.cut[f"prompts cut for replies of {most}"] += 1
        ids = prompt.ids
        return Prompt(
            ids, [False] * len(ids), f"{file.name}[{number}]", columns=columns, text=messages[-1]["content"]
        )

    def _dialogue(self, messages: Messages, file: SourceFile, number: int, counts: _Counts) -> Example:
        messages = self._filled(messages, file, number)
        last_only = self.settings.mask_history or self.settings.stage == "kto"
        most = file.source.use.max_reply_tokens
        if most is not None:
            replies = [message["content"] for message in messages if message["role"] == "assistant"]
            if sum(map(len, self.tokenizer.encode_batch(replies)), len(replies)) > most * len(replies):
                raise Unwanted(f"with replies of more than {most} tokens")  # their ends included
        ids, mask, what = self._encoded(messages, last_only, file, number)
        if what:
            counts.cut[what] += 1
        if self.settings.train_on_prompt:
            mask = [False] + [True] * (len(ids) - 1)
        return Example(ids, mask, f"{file.name}[{number}]")

    def _encoded(
        self, messages: Messages, last_only: bool, file: SourceFile, number: int
    ) -> tuple[list[int], list[bool], str]:
        try:
            return encode_within(self.tokenizer, messages, self.length, last_only)
        except UserError as error:
            raise UserError(f"{file.path}: item {number}: {error}") from None

    def _filled(self, messages: Messages, file: SourceFile, number: int) -> Messages:
        """Messages with ``identity`` in the place of ``{{placeholders}}``. Raises UserError for others."""
        if not any("{{" in message["content"] for message in messages):
            return messages
        unfilled: set[str] = set()
        filled = [
            {**message, "content": fill_placeholders(message["content"], self.settings.identity, unfilled)}
            for message in messages
        ]
        if unfilled and not self.settings.keep_placeholders:
            keys = sorted(unfilled)
            raise UnfilledPlaceholder(
                f"{file.path}: item {number} has unfilled placeholders "
                f"{', '.join(f'{{{{{key}}}}}' for key in keys)}; fill them with "
                f"--identity {' '.join(f'{key}=…' for key in keys)}, or keep them as text with "
                "--keep_placeholders"
            )
        return filled


def mismatched(groups: list[Group], length: int) -> list[Group]:
    """Each example with its prompt and the reply before it in the list, from which KTO estimates how far the
    model is from its reference. Raises UserError unless there are good and bad replies."""
    if len({group[0].desirable for group in groups}) < 2 or len(groups) < 2:
        raise UserError("stage kto needs replies tagged as good and replies tagged as bad")
    pairs = []
    for group, before in zip(groups, [groups[-1], *groups[:-1]], strict=True):
        prompt, reply = group[0].mask.index(True), before[0].mask.index(True)
        ids = (group[0].ids[:prompt] + before[0].ids[reply:])[: max(length, prompt + 1)]
        mask = [False] * prompt + [True] * (len(ids) - prompt)
        pairs.append([group[0], Example(ids, mask, group[0].name, group[0].desirable)])
    return pairs

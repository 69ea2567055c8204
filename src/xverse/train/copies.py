"""The checkpoints of a run whose folder is at a URL: each is sent there after it is written here, and a run
that starts on another machine brings the newest complete one back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from xverse.config import UserError
from xverse.log import notice
from xverse.place import LISTS, RECORD, Place, copy, fetch
from xverse.remote import listing, remove, upload, version
from xverse.train.keeping import LOCK, Kept
from xverse.train.parallel import World

RECORDS = ("metrics.jsonl", "finetune.json")  # beside the checkpoints; they continue with the run


@dataclass(frozen=True)
class Copies:
    """``place`` is the run's folder, ``kept`` its checkpoints on this machine. ``keep`` copies stay besides
    those kept forever; None: all."""

    place: Place
    kept: Kept
    keep: int | None

    def bring(self, world: World, anew: bool = False) -> None:
        """Before a run, by every process, with the folder's lock held: copy the newest intact checkpoint if
        those here are older, or send the one here if it is newer. With ``anew`` delete all at the URL.

        Raises UserError, in every process, if the store cannot be read or the processes share no folder."""
        problem = ""
        if self.place.url and not (self.place.local / LOCK).exists():
            problem = f"{self.place}: all machines must share XVERSE_CACHE, where its files are written first"
        elif self.place.url and world.rank == 0:
            try:
                problem = self._bring(anew)
            except UserError as error:
                problem = str(error)
        problem = world.first(problem)
        if problem:
            raise UserError(problem)

    def _bring(self, anew: bool) -> str:
        complete, names = self._there()
        for name in names if anew else names - complete.keys():  # a killed run left them
            remove(self._url(name))
        if anew:
            return ""
        own, problem = self.kept.all(), ""
        newest = self.kept.step(own[-1]) if own else -1
        for name in sorted(complete, key=complete.__getitem__, reverse=True):
            if complete[name] <= newest:
                break
            try:
                copied = fetch(self._url(name), list, "models")
            except UserError as error:
                problem = f"{error}"
                notice(f"WARNING: {error}; going back to an earlier checkpoint")
                continue
            (copied / RECORD).unlink()
            self.kept.folder.mkdir(parents=True, exist_ok=True)
            copied.replace(self.kept.folder / name)
            newest = complete[name]
        if problem and newest < 0:
            return f"{problem}, and no earlier checkpoint is intact"
        for name in RECORDS:
            if not (self.place.local / name).exists() and version(f"{self.place.url}/{name}") is not None:
                copy(f"{self.place.url}/{name}", self.place.local / name)
        return self.send(own[-1], True) if own and newest > max(complete.values(), default=-1) else ""

    def send(self, path: Path, last: bool) -> str:
        """Send a finished checkpoint and the records, then delete those there that are too many. Returns why
        it failed if the run ends with it; otherwise that is a warning, and the next one may succeed."""
        try:
            if self.place.url:
                self._send(path)
        except UserError as error:
            if last:
                return f"{error}; {path} is intact; run the same command again to send it"
            notice(f"WARNING: {path.name} was not sent ({error}); training continues")
        return ""

    def _send(self, path: Path) -> None:
        Place(path, self._url(path.name)).send()
        for name in RECORDS:
            if (self.place.local / name).exists():
                upload(self.place.local / name, f"{self.place.url}/{name}")
        complete, _ = self._there()
        for name in sorted(complete, key=complete.__getitem__)[: -self.keep] if self.keep else []:
            if not self.kept.forever(complete[name]):
                for mark in LISTS:  # first, so that what a kill leaves of it is not taken for one
                    remove(f"{self._url(name)}/{mark}")
                remove(self._url(name))

    def _there(self) -> tuple[dict[str, int], set[str]]:
        """The names of complete checkpoints at the URL with their steps, and of all."""
        pattern = re.compile(rf"({re.escape(self.kept.prefix)}(\d+))/(.+)")
        found = [match for match in map(pattern.fullmatch, listing(self._url(""))) if match]
        return {m[1]: int(m[2]) for m in found if m[3] in LISTS}, {match[1] for match in found}

    def _url(self, name: str) -> str:
        folder = self.kept.folder.relative_to(self.place.local).as_posix()
        return "/".join(part for part in (self.place.url, folder, name) if part not in (".", ""))

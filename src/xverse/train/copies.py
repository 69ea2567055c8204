"""The checkpoints of a run whose folder is at a URL: each is sent there after it is written here, and a run
that starts on another machine brings the newest complete one back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from xverse.config import UserError
from xverse.files import atomic_directory
from xverse.log import notice
from xverse.place import LISTS, Place, checked, copy, read_list
from xverse.remote import listing, remove, upload, version
from xverse.train.keeping import LOCK, Kept
from xverse.train.parallel import World


@dataclass(frozen=True)
class Copies:
    """``place`` is the run's folder. ``kept`` finds its checkpoints on this machine, which all processes
    share. ``keep`` is how many stay, besides those kept forever; None: all. ``records`` are the files beside
    them that continue with the run."""

    place: Place
    kept: Kept
    keep: int | None
    records: tuple[str, ...]

    def bring(self, world: World, anew: bool = False) -> None:
        """Before a run, by every process, with the folder's lock held: copy the newest intact checkpoint that
        is not older than those here, or send the one here if it is newer. With ``anew`` delete all there.

        Raises UserError, in every process, where the store cannot be read."""
        if not self.place.url:
            return
        problem = ""
        if not (self.place.local / LOCK).exists():
            problem = f"{self.place}: all machines must share XVERSE_CACHE, where its files are written first"
        elif world.rank == 0:
            try:
                self._bring(anew)
            except UserError as error:
                problem = str(error)
        problem = world.first(problem)
        if problem:
            raise UserError(problem)

    def _bring(self, anew: bool) -> None:
        complete, names = self._there()
        for name in names - (set() if anew else complete.keys()):  # a killed run left them
            remove(self._url(name))
        if anew:
            return
        own = self.kept.all()
        newest, problems = self.kept.step(own[-1]) if own else -1, []
        for name in sorted(complete, key=complete.__getitem__, reverse=True):
            if complete[name] <= newest:
                break
            try:
                self._copy(name)
            except UserError as error:
                problems.append(f"{error}")
                continue
            newest = complete[name]
            break
        for problem in problems:
            notice(f"WARNING: {problem}; going back to an earlier checkpoint")
        if problems and newest < 0:
            raise UserError(f"{problems[0]}, and no earlier checkpoint is intact")
        for name in self.records:
            if not (self.place.local / name).exists() and version(f"{self.place.url}/{name}") is not None:
                copy(f"{self.place.url}/{name}", self.place.local / name)
        if own and newest > max(complete.values(), default=-1):
            self.send(own[-1])

    def _copy(self, name: str) -> None:
        """Copy a checkpoint, verified by its list. The list itself comes last."""
        url = self._url(name)
        marks = read_list(url)
        with atomic_directory(self.kept.folder / name) as temporary:
            for file in listing(url):
                copy(f"{url}/{file}", temporary / checked(file, url), marks.get(file))
            for file in marks:
                if not (temporary / file).is_file():
                    raise UserError(f"{url}/{file}: missing")
        notice(f"{url}: copied to {self.kept.folder / name}")

    def send(self, path: Path) -> None:
        """Send a finished checkpoint and the records, then delete those there that are too many.

        Raises UserError where the network or the store fails for long."""
        if not self.place.url:
            return
        Place(path, self._url(path.name)).send()
        for name in self.records:
            if (self.place.local / name).exists():
                upload(self.place.local / name, f"{self.place.url}/{name}")
        complete, _ = self._there()
        names = sorted(complete, key=complete.__getitem__)
        for name in names[: -self.keep] if self.keep else []:
            if not self.kept.forever(complete[name]):
                for mark in LISTS:  # first, so that what is left of it after a kill is not taken for one
                    remove(f"{self._url(name)}/{mark}")
                remove(self._url(name))

    def try_to_send(self, path: Path, last: bool) -> str:
        """``send``; returns why it failed if the run ends with it. Otherwise the next one may succeed."""
        try:
            self.send(path)
        except UserError as error:
            if last:
                return f"{error}; {path} is intact; run the same command again to send it"
            notice(f"WARNING: {path.name} was not sent ({error}); training continues")
        return ""

    def _there(self) -> tuple[dict[str, int], set[str]]:
        """The names of complete checkpoints at the URL with their steps, and of all."""
        found = {}
        names = set()
        for file in listing(self._url("")):
            match = re.fullmatch(rf"({re.escape(self.kept.prefix)}(\d+))/(.+)", file)
            if match:
                names.add(match[1])
                if match[3] in LISTS:
                    found[match[1]] = int(match[2])
        return found, names

    def _url(self, name: str) -> str:
        folder = self.kept.folder.relative_to(self.place.local).as_posix()
        return "/".join(part for part in (self.place.url, folder, name) if part not in (".", ""))

"""The engine in a separate thread, with its events delivered to asyncio.

One thread owns the engine. Requests and cancellations reach it through a queue; the events of a step return
to the event loop in one call. An exception in a step ends the running requests, and the thread continues. If
the thread itself dies or its device fails for good, all open requests fail, and ``on_death`` is called so
that the server can exit.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from xverse.config import UserError
from xverse.device import is_lost
from xverse.engine import Adapter, Engine, Event, Request
from xverse.log import notice

_STUCK = 60.0  # seconds of a single step after which the engine counts as stuck


class Busy(Exception):
    """Too many requests are waiting."""


class Draining(Exception):
    """The server is shutting down and accepts no new requests."""


@dataclass(eq=False)
class _Ticket:
    """One open request; the thread's reports arrive in ``events``."""

    request: Request
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    handle: int | None = None


class EngineRunner:
    """Call ``stream`` within ``admitted``, from any task of the event loop in which ``start`` was called."""

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        if max_waiting < 1:
            raise UserError(f"max_waiting: {max_waiting} is out of range (at least 1)")
        self.engine = engine
        self.tokens = 0  # generated since the start
        self.failures = 0  # exceptions in a step
        self.dead: str | None = None  # why the thread ended, if it died
        self.draining = False
        self.most = engine.max_batch + max_waiting  # requests that may wait or run
        self.on_death: Callable[[], None] | None = None
        self.open = 0  # requests that are admitted and have not ended
        self.uses: Counter[Adapter | None] = Counter()  # admitted requests by their adapter
        self._commands: queue.SimpleQueue[tuple[str, _Ticket | None]] = queue.SimpleQueue()
        self._tickets: dict[int, _Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._step_ended = time.monotonic()
        self._working = False
        self.stats = engine.stats()  # a recent copy, because the engine belongs to its thread
        self._stats_at = 0.0

    def start(self) -> None:
        """Start the thread; events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @contextmanager
    def admitted(self, requests: Sequence[Request], at_once: int) -> Iterator[None]:
        """Keeps room for ``requests``, of which ``at_once`` run or wait at a time, until the block ends.

        They can begin at any time within, during shutdown too. Raises Busy if the queue is full, Draining
        during shutdown.
        """
        if self.draining or self.dead:
            raise Draining("the server is shutting down")
        if self.open + at_once > self.most:
            raise Busy("too many requests are waiting")
        self.open += at_once
        adapters = Counter(request.adapter for request in requests)
        self.uses += adapters
        try:
            yield
        finally:
            self.open -= at_once
            self.uses -= adapters  # without entries of 0: they would keep adapters in memory

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; closing the generator cancels it and frees its blocks.

        Raises UserError for a request that cannot run, Draining if the engine has died.
        """
        ticket = _Ticket(request)
        ended = False
        self._commands.put(("submit", ticket))
        try:
            if self.dead:  # it died after the request was admitted
                raise Draining("the engine has died")
            while not ended:
                event = await ticket.events.get()
                if isinstance(event, Exception):
                    ended = True
                    raise event
                ended = event.finish_reason is not None
                yield event
        finally:
            if not ended:
                self._commands.put(("cancel", ticket))

    def alive(self) -> bool:
        return self._thread.is_alive() and self.dead is None

    def ready(self) -> bool:
        """Whether a request would be answered: the thread is alive and either idle or making progress."""
        progressing = time.monotonic() - self._step_ended < _STUCK
        return self.alive() and not self.draining and (progressing or not self._working)

    async def drain(self, timeout: float) -> None:
        """Accept no more requests and wait for the open ones, at most ``timeout`` seconds."""
        self.draining = True
        end = time.monotonic() + timeout
        while self.open and time.monotonic() < end and self.alive():
            await asyncio.sleep(0.02)
        self._commands.put(("stop", None))

    def _run(self) -> None:
        try:
            while self._process_commands():
                if not self._working:
                    self._working, self._step_ended = True, time.monotonic()
                try:
                    events = self.engine.step()
                except Exception as error:
                    self.failures += 1
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    notice(f"serve: a step of the engine failed: {reason}")
                    if is_lost(error):
                        raise
                    events = self.engine.fail(f"the engine failed: {reason}")
                self._step_ended = time.monotonic()
                self._deliver(events)
                self._update_stats()
        except BaseException as error:
            self.dead = f"{type(error).__name__}: {error}"
            lost = [*self._tickets.values()]
            while not self._commands.empty():
                _, ticket = self._commands.get()
                lost += [ticket] if ticket is not None else []
            died = Draining("the engine has died")
            self._post(functools.partial(_deliver_to, [(ticket, died) for ticket in lost]))
            if self.on_death is not None:
                self.on_death()
            raise

    def _update_stats(self) -> None:
        """Refresh the copy of the statistics four times a second, and when the engine becomes idle."""
        if self._step_ended - self._stats_at > 0.25 or not self.engine.busy:
            self._stats_at = self._step_ended
            self.stats = self.engine.stats()

    def _process_commands(self) -> bool:
        """Process queued commands; wait for more while the engine is idle. False means stop."""
        while True:
            idle = not self.engine.busy
            if idle:
                self._working = False
            try:
                kind, ticket = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if kind == "submit":
                self._submit(ticket)
            elif ticket.handle is not None:
                self.engine.cancel(ticket.handle)
                self._tickets.pop(ticket.handle, None)
                self._update_stats()

    def _submit(self, ticket: _Ticket) -> None:
        try:
            ticket.handle = self.engine.submit(ticket.request)
        except UserError as error:
            self._post(functools.partial(_deliver_to, [(ticket, error)]))
        else:
            self._tickets[ticket.handle] = ticket

    def _deliver(self, events: list[Event]) -> None:
        delivery: list[tuple[_Ticket, Event | Exception]] = []
        for event in events:
            ticket = self._tickets.get(event.handle)
            self.tokens += event.token_id is not None
            if ticket is not None:
                delivery.append((ticket, event))
                if event.finish_reason is not None:
                    del self._tickets[event.handle]
        if delivery:
            self._post(functools.partial(_deliver_to, delivery))

    def _post(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop has ended
            return


def _deliver_to(delivery: Sequence[tuple[_Ticket, Event | Exception]]) -> None:
    for ticket, event in delivery:
        ticket.events.put_nowait(event)

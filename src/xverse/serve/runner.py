"""The engine in a thread of its own, and its events in asyncio.

One thread owns the engine. Requests and cancellations reach it through a queue; what happened in a step goes
back to the event loop in one call. An exception in a step ends the requests that ran; the thread goes on. If
the thread itself dies, everybody is told, and ``on_death`` is called: a server without a generator is to end.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from xverse.config import UserError
from xverse.engine import Engine, Event, Request

_STUCK = 60.0  # seconds without a step's end, while there is work, after which the engine counts as stuck


class Busy(Exception):
    """Too many requests wait already; ``retry_after`` seconds is a guess when fewer will."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after = retry_after


class Draining(Exception):
    """The server is shutting down and takes no new requests."""


@dataclass(eq=False)
class _Ticket:
    """One request on its way: what the thread reports arrives in ``events``."""

    request: Request
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    handle: int | None = None


class EngineRunner:
    """``stream`` requests from any task of the event loop in which ``start`` was called."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 256,
    ) -> None:
        if max_waiting < 1:
            raise UserError(f"max_waiting: {max_waiting} is out of range (at least 1)")
        self.engine = engine
        self.tokens = 0  # generated since the start
        self.failures = 0  # exceptions in a step
        self.dead: str | None = None  # why the thread ended, where it was not asked to
        self.draining = False
        self._max_open = engine.max_batch + max_waiting
        self.on_death: Callable[[], None] | None = None
        self._open = 0
        self._orders: queue.SimpleQueue[tuple[str, _Ticket | None]] = queue.SimpleQueue()
        self._tickets: dict[int, _Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._step_ended = time.monotonic()
        self._working = False
        self.stats = engine.stats()  # of a moment ago: the engine itself belongs to its thread
        self._looked = 0.0

    def start(self) -> None:
        """Begin in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; closing the generator cancels it and frees its blocks.

        Raises Busy where the queue is full, Draining during shutdown, UserError for what cannot run.
        """
        self.check_room()
        ticket = _Ticket(request)
        self._open += 1
        ended = False
        self._orders.put(("submit", ticket))
        try:
            if self.dead:  # it died while this was put down
                raise Draining("the engine has died")
            while not ended:
                event = await ticket.events.get()
                if isinstance(event, Exception):
                    ended = True
                    raise event
                ended = event.finish_reason is not None
                yield event
        finally:
            self._open -= 1
            if not ended:
                self._orders.put(("cancel", ticket))

    def check_room(self) -> None:
        """Raises Busy or Draining where ``stream`` would."""
        if self.draining or self.dead:
            raise Draining("the server is shutting down")
        if self._open >= self._max_open:
            raise Busy(retry_after=5)

    @property
    def most(self) -> int:
        """How many requests may wait or run."""
        return self._max_open

    @property
    def open(self) -> int:
        """Requests that wait or run."""
        return self._open

    def alive(self) -> bool:
        return self._thread.is_alive() and self.dead is None

    def ready(self) -> bool:
        """Whether a request would be answered: the thread lives, and is idle or ended a step lately."""
        lately = time.monotonic() - self._step_ended < _STUCK
        return self.alive() and not self.draining and (lately or not self._working)

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait until those that are there have ended, or ``timeout`` seconds."""
        self.draining = True
        end = time.monotonic() + timeout
        while self._open and time.monotonic() < end and self.alive():
            await asyncio.sleep(0.02)
        self._orders.put(("stop", None))

    def _run(self) -> None:
        try:
            while self._obey():
                if not self._working:
                    self._working, self._step_ended = True, time.monotonic()
                try:
                    events = self.engine.step()
                except Exception as error:
                    self.failures += 1
                    events = self.engine.fail(f"the engine failed: {type(error).__name__}: {error}")
                self._step_ended = time.monotonic()
                self._deliver(events)
                self._look()
        except BaseException as error:
            self.dead = f"{type(error).__name__}: {error}"
            lost = [*self._tickets.values()]
            while not self._orders.empty():  # nobody will read them any more
                _, ticket = self._orders.get()
                lost += [ticket] if ticket is not None else []
            died = Draining("the engine has died")
            self._post(functools.partial(_tell, [(each, died) for each in lost]))
            if self.on_death is not None:
                self.on_death()
            raise

    def _look(self) -> None:
        """Keep the figures fresh: four times a second, and when nothing is left to do."""
        if self._step_ended - self._looked > 0.25 or not self.engine.busy:
            self._looked = self._step_ended
            self.stats = self.engine.stats()

    def _obey(self) -> bool:
        """Carry out the orders that are there, and wait for more until there is work. False: the end."""
        while True:
            idle = not self.engine.busy
            if idle:
                self._working = False
            try:
                kind, ticket = self._orders.get(block=idle)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if kind == "submit":
                self._submit(ticket)
            elif ticket.handle is not None:
                self.engine.cancel(ticket.handle)
                self._tickets.pop(ticket.handle, None)
                self._look()

    def _submit(self, ticket: _Ticket) -> None:
        try:
            ticket.handle = self.engine.submit(ticket.request)
        except UserError as error:
            self._post(functools.partial(_tell, [(ticket, error)]))
        else:
            self._tickets[ticket.handle] = ticket

    def _deliver(self, events: list[Event]) -> None:
        found: list[tuple[_Ticket, Event | Exception]] = []
        for event in events:
            ticket = self._tickets.get(event.handle)
            self.tokens += event.token_id is not None
            if ticket is not None:
                found.append((ticket, event))
                if event.finish_reason is not None:
                    del self._tickets[event.handle]
        if found:
            self._post(functools.partial(_tell, found))

    def _post(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop has ended: nobody listens any more
            return


def _tell(news: Sequence[tuple[_Ticket, Event | Exception]]) -> None:
    for ticket, what in news:
        ticket.events.put_nowait(what)

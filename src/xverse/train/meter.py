"""What a person sees of a run: speed, loss and the time left."""

from __future__ import annotations

import time

from xverse.log import console, notice, progress
from xverse.train.settings import TrainConfig


class Meter:
    """Speed, and what a person sees of it: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, config: TrainConfig, first_step: int, quiet: bool = False) -> None:
        self._config, self._first, self._quiet = config, first_step, quiet
        self._bar = progress(disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("training", total=config.steps, completed=first_step)
        self._start = self._last = time.perf_counter()
        self._spent = 0.0
        self._tokens = 0

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def forget_time(self) -> None:
        """Leave what happened since the last step (validation, a checkpoint) out of the speed."""
        self._last = time.perf_counter()

    def step(self, step: int, loss: float, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._spent += seconds
        self._tokens += tokens
        speed = self._tokens / self._spent
        text = f"loss {loss:.3f} · {speed:,.0f} tok/s"
        self._bar.update(self._task, completed=step + 1, description=text)
        done, steps = step + 1, self._config.steps
        if not (self._quiet or console.is_terminal) and (done % self._config.log_every == 0 or done == steps):
            left = (steps - done) * (now - self._start) / (done - self._first)
            notice(f"step {done}/{steps} · {text} · {left / 60:.1f} min left")
        return {"tokens_per_second": round(tokens / seconds, 1), "seconds": round(seconds, 4)}

    def say(self, text: str) -> None:
        if not self._quiet:
            console.print(text, markup=False)

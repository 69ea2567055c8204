"""Progress of a run on the console: loss, speed next to its bound, where the time goes, and time left."""

from __future__ import annotations

import time

from xverse.log import console, notice, progress
from xverse.model import XverseConfig
from xverse.train.report import Peak
from xverse.train.settings import TrainConfig


class Meter:
    """Measures speed and shows it: a bar in a terminal, a line every ``log_every`` steps elsewhere.

    ``began`` is when this process started the run (``time.perf_counter``); goodput counts from there.
    """

    def __init__(
        self,
        config: TrainConfig,
        first_step: int,
        shape: XverseConfig,
        *,
        devices: int = 1,
        peak: Peak | None = None,
        began: float | None = None,
        quiet: bool = False,
    ) -> None:
        self._config, self._first, self._quiet = config, first_step, quiet
        self._shape, self._devices, self._peak = shape, devices, peak
        self._bar = progress(disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("training", total=config.steps, completed=first_step)
        self._start = self._last = time.perf_counter()
        self._began = self._start if began is None else began
        self._spent = self._waited = 0.0
        self._tokens = 0
        self._exposed: float | None = None  # share of the last profiled step

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def forget_time(self) -> None:
        """Exclude the time since the last step (validation, a checkpoint) from the speed."""
        self._last = time.perf_counter()

    def exposed(self, share: float) -> None:
        """Record the share of a profiled step's time that was exposed communication."""
        self._exposed = share

    def step(self, step: int, loss: float, tokens: int, length: int, waited: float) -> dict[str, float]:
        """Record a step of ``tokens`` in sequences of ``length`` that waited ``waited`` seconds for its data;
        returns its figures. TFLOP/s are per device."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._spent += seconds
        self._waited += waited
        self._tokens += tokens
        flops = self._shape.flops_per_token(length)
        rates = {kind: count * tokens / seconds / self._devices for kind, count in flops.items()}
        self._say(step, loss, {kind: count * self._tokens / self._spent for kind, count in flops.items()})
        figures = {
            "seconds": round(seconds, 4),
            "data_seconds": round(waited, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "tflops": round(rates["full"] / 1e12, 4),
            "goodput": round(self._spent / (now - self._began), 4),
        }
        if self._peak:
            name = self._peak.name
            figures |= {f"{name}_{kind}": round(rate / self._peak.flops, 4) for kind, rate in rates.items()}
        return figures

    def _say(self, step: int, loss: float, rates: dict[str, float]) -> None:
        done, steps = step + 1, self._config.steps
        text = f"loss {loss:.3f} · {self._tokens / self._spent:,.0f} tok/s"
        self._bar.update(self._task, completed=done, description=text)
        if self._quiet or console.is_terminal or (done % self._config.log_every and done != steps):
            return
        now = time.perf_counter()
        text += f" · {rates['full'] / self._devices / 1e12:.3g} TFLOP/s a device"
        if self._peak:
            full, causal = (
                f"{100 * rates[kind] / self._devices / self._peak.flops:.0f} %" for kind in ("full", "causal")
            )
            what = "of the matmul measured here" if self._peak.measured else self._peak.label
            text += f" ({full} {what}, causal {causal})"
        text += f" · goodput {100 * self._spent / (now - self._began):.0f} %"
        text += f" · data {100 * self._waited / self._spent:.1f} %"
        if self._exposed is not None:
            text += f" · communication {100 * self._exposed:.1f} %"
        left = (steps - done) * (now - self._start) / (done - self._first)
        notice(f"step {done}/{steps} · {text} · {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        if not self._quiet:
            console.print(text, markup=False)

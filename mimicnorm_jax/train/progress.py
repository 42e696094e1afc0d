"""What the person in front of the run sees: a live bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from mimicnorm_jax.progress_bar import progress_bar

_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Progress of the steps with loss, accuracy, images/s and ETA, in about 80 columns.

    Args:
      step: step the run starts at.
      total_steps: step it ends at.
      quiet: show nothing, in a process that does not speak for its run.
    """

    def __init__(self, step: int, total_steps: int, *, quiet: bool = False):
        self._quiet = quiet
        self._total = total_steps
        self._first_step = step
        self._start = self._last_line = time.monotonic()
        bar = progress_bar(
            total=total_steps,
            initial=step,
            shown=not quiet,
            unit="step",
            smoothing=0.1,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}",
        )
        self._bar = None if bar.disable else bar

    def restart_clock(self) -> None:
        """Leaves what came before, such as compilation, out of the remaining time."""
        self._start = time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def advance(self, step: int) -> None:
        """Shows that ``step`` is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, row: dict[str, Any]) -> None:
        """Shows a row of training metrics."""
        if self._quiet:
            return
        step, speed = row["step"], row["images_per_second"]
        floor = f"(at least {row['train_loss_floor']:.3f}) " if "train_loss_floor" in row else ""
        text = (
            f"epoch {row['epoch']:.1f} loss {row['train_loss']:.3f} {floor}"
            f"acc {100 * row['train_accuracy']:.1f}% "
            + (f"{speed:.0f} img/s" if speed is not None else "")
        ).rstrip()
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and step < self._total:
            return
        self._last_line = now
        done = max(1, step - self._first_step)
        left = (now - self._start) / done * (self._total - step)
        print(f"{step}/{self._total} {text}, {_clock(left)} left", flush=True)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


class Throughput:
    """Images per second of training, without compilation, evaluation and checkpoints.

    Attributes:
      wait_fraction: share of the time that the host waited for input, between the last two
        calls of ``rate``; None before any.
    """

    def __init__(self) -> None:
        self.wait_fraction: float | None = None
        self._waited = 0.0
        self._since = time.monotonic()
        self._images = self._total_images = 0
        self._rate: float | None = None
        self._total_seconds = 0.0

    def restart(self) -> float:
        """Forgets what came before; returns how many seconds that was."""
        before, self._since = self._since, time.monotonic()
        self._images = 0
        self._waited = 0.0
        return self._since - before

    def add(self, images: int) -> None:
        """Counts the images of a step."""
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time spent in the ``with`` block."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent in the ``with`` block as waiting for input."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def rate(self) -> float | None:
        """Images per second since the last call, else the last rate; None before any."""
        if self._images:
            images, waited = self._images, self._waited
            seconds = self.restart()
            self.wait_fraction = waited / seconds
            self._rate = images / seconds
            self._total_images += images
            self._total_seconds += seconds
        return self._rate

    def total_rate(self) -> float | None:
        """Images per second over all calls of ``rate``; None if there was nothing to time."""
        return self._total_images / self._total_seconds if self._total_images else None

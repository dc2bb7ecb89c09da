"""Progress of a long job: a bar on a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

INTERVAL = 30.0  # seconds between two lines of a log


class Progress:
    """Counts up to a total; use it as a context.

    A log gets a line every `INTERVAL` seconds and one at the end, so that it stays readable and shows at once whether
    a job is alive. A terminal gets a bar that is drawn once for each `update`.

    Args:
        name: the beginning of each line.
        total: number of units, None = unknown.
        unit: name of the units, in the plural.
        shown: whether this process prints.
        bar: whether a terminal gets a bar; else it gets a log's lines.
        start: number of units done before.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        shown: bool = True,
        bar: bool = True,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit, self.shown = name, total, unit, shown
        self.done = self.start = start
        self.text = self._said = ""
        self._clock = clock
        self._opened = self._started = self._spoken = clock()
        self._bar: tqdm | None = None
        if shown and bar and sys.stderr.isatty():
            # miniters: drawn again while nothing is counted, for the text
            self._bar = tqdm(desc=name, total=total, unit=f" {unit}", initial=start, mininterval=0.5, miniters=0)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Leave the bar on the terminal, or write a last line to the log."""
        if self._bar is not None:
            self._bar.close()
        elif not failed and self.done > self.start:
            self._say()

    def begin(self, done: int) -> None:
        """Continue from `done`, which others or earlier runs did: speed and time left count later work only."""
        self.done = self.start = done
        self._started = self._clock()
        if self._bar is not None:
            self._bar.reset(self.total)
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
            self._bar.refresh()

    def update(self, count: int, text: str | None = None, now: bool = False) -> None:
        """Count `count` more; `text` follows the numbers from then on, `now` prints a line at once."""
        self.done += count
        self.text = self.text if text is None else text
        if self._bar is not None:
            self._bar.set_postfix_str(self.text, refresh=False)
            self._bar.update(count)
        elif now or self._clock() - self._spoken >= INTERVAL:
            self._say()

    def _say(self) -> None:
        """Write a line to standard error, unless it repeats the last one."""
        self._spoken = self._clock()
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        news = ", ".join(filter(None, (f"{self.unit} {count}", self.text)))
        if self.shown and news != self._said:
            self._said = news
            sys.stderr.write(f"{self.name}: {', '.join(filter(None, (news, self._left())))}\n")
            sys.stderr.flush()

    def _left(self) -> str:
        """The time left, or the time taken; the speed where the total is unknown."""
        now, since = self._clock(), self.done - self.start
        if not since:
            return ""
        if self.total is None:
            return f"{since / max(now - self._started, 1e-9):,.1f} {self.unit}/s"
        if self.done >= self.total:
            return f"took {tqdm.format_interval(now - self._opened)}"
        return f"{tqdm.format_interval((now - self._started) / since * (self.total - self.done))} left"

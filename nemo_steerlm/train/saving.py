"""When a training saves its whole state, and how a signal ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from lightning.pytorch.callbacks import Callback

from nemo_steerlm.errors import Stopped
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.checkpoint import CheckpointFolder
from nemo_steerlm.train.strategy import DistributedCheckpointIO

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS = 15 * 60.0  # between checkpoints, where no number of steps is given
TIME_IS_UP = signal.SIGALRM  # stands for `trainer.max_time`: its exit code is that of this signal, 142


class TimeLimit:
    """Whether a training has to save now, to be done within its time.

    One more step and the save have to fit, each as long as the longest so far. A step lasts from one save to the next
    moment at which saving is possible: a validation between two steps counts.

    Args:
        seconds: from the start of this process; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._start = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._step = self._save = 0.0  # the longest
        self._since: float | None = None
        self._saving: float | None = None

    def step_begins(self) -> None:
        """The weights are what the last save holds, or what the training began with."""
        self._since = time.monotonic()

    def step_ends(self) -> bool:
        """Note how long the step took; whether time is up."""
        now = time.monotonic()
        if self._since is not None:
            self._step = max(self._step, now - self._since)
        return self.seconds is not None and now - self._start + self._step + self._save >= self.seconds

    def save_begins(self) -> None:
        """A save has been asked for."""
        self._saving = time.monotonic()

    def save_ends(self) -> None:
        """Nothing is being written any more."""
        if self._saving is not None:
            self._save = max(self._save, time.monotonic() - self._saving)
            self._saving = None


class Checkpoints(Callback):
    """Saves the training every so many steps or minutes, after the last step, and before a signal or a clock ends it.

    A signal to any process ends all of them: they agree on the step, finish and save it. `Stopped` is raised after
    the step's metrics are logged; a running validation ends early only if its step is already saved. The limit of
    time works like a signal to rank 0, whose clock alone is read.

    Args:
        folder: where the checkpoints go.
        every: optimizer steps between them; None: every `SECONDS`.
        last: the last step.
        io: writes them.
        limit: of time.
    """

    def __init__(
        self, folder: CheckpointFolder, every: int | None, last: int, io: DistributedCheckpointIO, limit: TimeLimit
    ) -> None:
        self.folder, self.every, self.last, self.io, self.limit = folder, every, last, io, limit
        self._received = self._agreed = 0  # number of a signal
        self._saved: int | None = None
        self._due = time.monotonic() + SECONDS

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals inside the context instead of ending at once; ignored signals stay ignored.

        A second SIGINT interrupts at once. Python handles signals in the main thread only: in others nothing changes.
        """
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        if threading.current_thread() is not threading.main_thread():
            handlers = {}
        before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Lightning's hook after each optimizer step."""
        step = trainer.global_step
        time_is_up = self.limit.step_ends() and step < self.last
        self._poll()
        due = step % self.every == 0 if self.every else time.monotonic() >= self._due
        self._agreed, due, up = parallel.highest(self._received, int(due), int(time_is_up and parallel.is_rank_zero()))
        self._agreed = self._agreed or up * TIME_IS_UP
        if due or self._agreed or step == self.last:
            self.limit.save_begins()
            trainer.save_checkpoint(self.folder.path(step))
            self._poll()
            self.folder.prune()
            self._saved, self._due = step, time.monotonic() + SECONDS
        self.limit.step_begins()

    def _poll(self) -> None:
        self.io.poll()
        if not self.io.busy:
            self.limit.save_ends()

    def on_train_start(self, *_: Any) -> None:
        """Lightning's hook once the checkpoint is loaded."""
        self.limit.step_begins()

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        """Lightning's hook within a validation."""
        (self._agreed,) = parallel.highest(self._received)
        self._end_if_told(trainer)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Lightning's hook before a step; the one before has been logged."""
        self._end_if_told(trainer)

    on_validation_start = on_train_batch_start

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Lightning's hook: wait for what is still being written."""
        self.io.finish()
        self.folder.prune()
        self._end_if_told(trainer)

    def _end_if_told(self, trainer: Any) -> None:
        step = trainer.global_step
        if self._agreed and self._saved == step:
            self.io.finish()
            self.folder.prune()
            parallel.barrier()  # until all is written, no process ends and takes others with it
            name = "trainer.max_time" if self._agreed == TIME_IS_UP else signal.Signals(self._agreed).name
            raise Stopped(self._agreed, f"stopped at step {step} by {name}; the same command goes on")

"""When a training saves its whole state, and how a signal ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_steerlm.errors import Stopped
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.checkpoint import CheckpointFolder
from nemo_steerlm.train.strategy import DistributedCheckpointIO

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS = 15 * 60.0  # between checkpoints, where no number of steps is given


class Checkpoints(Callback):
    """Saves the training every so many steps or minutes, after the last step, and before a signal ends it.

    A signal to any process ends all of them: they agree on the step, finish and save it. `Stopped` is raised after
    the step's metrics are logged; a running validation ends early only if its step is already saved.

    Args:
        folder: where the checkpoints go.
        every: optimizer steps between them; None: every `SECONDS`.
        last: the last step.
        io: writes them.
    """

    def __init__(self, folder: CheckpointFolder, every: int | None, last: int, io: DistributedCheckpointIO) -> None:
        self.folder, self.every, self.last, self.io = folder, every, last, io
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
        self.io.poll()
        step = trainer.global_step
        due = step % self.every == 0 if self.every else time.monotonic() >= self._due
        self._agreed, due = parallel.highest(self._received, int(due))
        if due or self._agreed or step == self.last:
            trainer.save_checkpoint(self.folder.path(step))
            self.folder.prune()
            self._saved, self._due = step, time.monotonic() + SECONDS

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
            name = signal.Signals(self._agreed).name
            raise Stopped(self._agreed, f"stopped at step {step} by {name}; the same command goes on")

"""Which rank is the slowest, and in what: a report every so many steps."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.phases import Phases

_log = logging.getLogger(__name__)
PHASES = ("data", "forward_backward", "optimizer", "other")


class Stragglers(Callback):
    """Logs the slowest rank of the last `every` steps, with its host and its seconds a step in each phase.

    A rank's own work is `data` and `forward_backward`: the slowest takes longest for it. The reduction of gradients,
    where ranks wait for each other, belongs to `other`, as all else of a step. `optimizer` contains the gathering of
    weights, which is a wait too. Ranks of one tensor- or pipeline-parallel group also wait for each other in
    `forward_backward`: such a group is slow as a whole.

    Args:
        every: steps between two reports.
        phases: measured by the model and its batches.
    """

    def __init__(self, every: int, phases: Phases) -> None:
        self.every, self.phases, self._steps = every, phases, 0
        phases.on = True

    def on_train_start(self, *_: Any) -> None:
        """Lightning's hook: learn the hosts of all ranks."""
        self.hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.phases.take()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Lightning's hook after each optimizer step."""
        self._steps += 1
        if trainer.global_step % self.every:
            return
        rows = _over_ranks(self._row())
        self._steps = 0
        slowest, figures = judge(rows)
        for logger in trainer.loggers:  # Lightning's own `log` would repeat them in the lines of later steps
            logger.log_metrics(figures, trainer.global_step)
        if parallel.is_rank_zero():
            said = "; ".join(
                f"{name.replace('_', ' and ')} {own:.3f} s ({median(row[place] for row in rows):.3f})"
                for place, (name, own) in enumerate(zip(PHASES, rows[slowest]))
            )
            _log.info(
                "stragglers at step %d: slowest is rank %d on %s, %.2f x the median; a step (the median): %s",
                trainer.global_step, slowest, self.hosts[slowest], figures["straggler/ratio"], said,
            )  # fmt: skip

    def _row(self) -> list[float]:
        """This rank's seconds a step, in the order of `PHASES`."""
        took = {name: seconds / self._steps for name, seconds in self.phases.take().items()}
        inside = took["run"] + took.get("optimizer", 0.0)
        own = took["run"] - took.get("reduction", 0.0)
        other = max(0.0, took["step"] - inside) + took.get("reduction", 0.0)
        return [took.get("data", 0.0), own, took.get("optimizer", 0.0), other]


def judge(rows: Sequence[Sequence[float]]) -> tuple[int, dict[str, float]]:
    """The slowest rank, and what is logged of it.

    Args:
        rows: seconds of each rank, in the order of `PHASES`.

    Returns:
        Its rank, and by their names in the metrics: `straggler/rank`, `ratio` (its own work, of the median rank's) and
        its seconds in each phase.
    """
    work = [row[0] + row[1] for row in rows]
    slowest = max(range(len(work)), key=work.__getitem__)
    figures = {"rank": float(slowest), "ratio": work[slowest] / max(median(work), 1e-9)}
    return slowest, {f"straggler/{k}": v for k, v in {**figures, **dict(zip(PHASES, rows[slowest]))}.items()}


def _over_ranks(row: list[float]) -> list[list[float]]:
    table: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(table, row)
    return table

"""Steps whose loss or gradient norm is not finite are skipped and counted; several in a row end the training."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch.distributed as dist

from nemo_steerlm.data.units import EMPTY
from nemo_steerlm.errors import DataError
from nemo_steerlm.megatron import parallel

_log = logging.getLogger(__name__)
_NAMED = 20  # samples in a message, at most


class BadSteps:
    """Checks every step before the optimizer changes the weights.

    Attributes:
        most: bad steps in a row that end the training (`trainer.max_bad_steps`).
        count: bad steps since the training was started or resumed.
    """

    def __init__(self, most: int = 3) -> None:
        self.most, self.count, self._in_a_row = most, 0, 0

    def judge(self, step: int, loss: float, norm: float, batch: list[dict], kept: list[dict[str, Any]]) -> bool:
        """Whether the optimizer may step; if not, the reason is logged.

        Args:
            step: its number, from 1.
            loss, norm: the sum of losses and the gradient norm of the global batch, the same on all ranks, so that
                all decide alike.
            batch: this rank's micro-batches.
            kept: what the loss kept of each, on the last pipeline stage; empty on the others.

        Raises:
            DataError: it is the last of `most` bad steps in a row; raised on every rank.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return True
        self.count += 1
        self._in_a_row += 1
        what = f"the loss is {_said(loss)}, the gradient norm {_said(norm)}"
        found = f"step {step}: {what}, with {_samples(batch, kept)}"
        if self._in_a_row >= self.most:
            raise DataError(
                f"{found}; that is the end, after {self._in_a_row} such steps in a row (trainer.max_bad_steps), none "
                "of which changed the weights: look at these samples, or lower optimizer.lr"
            )
        if parallel.is_rank_zero():
            _log.warning("%s; the step is skipped (%d in a row, %d end the run)", found, self._in_a_row, self.most)
        return False


def _said(value: float) -> str:
    return "finite" if math.isfinite(value) else "not finite"


def _samples(batch: list[dict], kept: list[dict[str, Any]]) -> str:
    """The samples, over all ranks, of the micro-batches whose loss is not finite; if none is known, all samples."""
    bad = [part for part, own in zip(batch, kept) if not math.isfinite(float(own["sum"]))]
    mine = [[int(i) for part in parts for i in part["indices"] if i != EMPTY] for parts in (bad, batch)]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    suspects, whole = ({index for rank in ranks for index in rank[which]} for which in (0, 1))
    named = sorted(suspects or whole)
    listed = ", ".join(map(str, named[:_NAMED])) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
    where = "in micro-batches whose loss is not finite" if suspects else "in the global batch"
    return f"the samples {listed} of the training data (the first is 0) {where}"

"""Losses of trainings, from the metrics.jsonl of each run folder, as a picture and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nemo_steerlm.files import read_jsonl
from nemo_steerlm.report.canvas import Theme, add_legend, new_panels
from nemo_steerlm.report.page import Cell, Row, Table
from nemo_steerlm.report.tables import NOTHING, number

Losses = Mapping[str, Sequence[tuple[int, float]]]  # "train" and "val": (step, loss) by step


def losses(run: str | Path) -> Losses:
    """The losses of a run folder; steps without a finite loss are left out.

    Raises:
        DataError: it has no metrics.jsonl.
    """
    rows = [row for _, row in read_jsonl(Path(run) / "metrics.jsonl")]
    found = {side: [(row["step"], row.get(f"{side}/loss")) for row in rows] for side in ("train", "val")}
    return {side: [(step, loss) for step, loss in pairs if loss is not None] for side, pairs in found.items()}


def training_table(trainings: Mapping[str, Losses]) -> Table:
    """The means of the first and the last tenth of the steps, and the validations if any, a line a training."""
    head, rows = ["Training", "#Steps", "#Loss, first tenth", "#Last tenth"], list[Row]()
    validated = any(found["val"] for found in trainings.values())
    for name, found in trainings.items():
        train, val = ([loss for _, loss in found[side]] for side in ("train", "val"))
        tenth = max(1, len(train) // 10)
        ends = [number(fmean(part)) if part else NOTHING for part in (train[:tenth], train[-tenth:])]
        step, lowest = min(found["val"], key=lambda pair: pair[1], default=(None, None))
        best = Cell(text=number(lowest), small="" if step is None else f"step {step}")
        row: list[str | Cell] = [name, number(len(train)), *ends]
        rows.append([*row, number(val[0] if val else None), best] if validated else row)
    return Table([*head, *(["#First validation", "#Lowest validation"] if validated else [])], rows)


def draw_losses(trainings: Mapping[str, Losses], theme: Theme) -> Any:
    """Loss over steps, one panel a training: every step, their running mean, and the validations."""
    figure, panels = new_panels(list(trainings), "step", "loss")
    for name, axis in panels.items():
        for side, pairs in trainings[name].items():
            if not pairs:
                continue
            steps, values = np.array(pairs, np.float64).T
            if side == "val":
                axis.plot(steps, values, "-s", color=theme.orange, markersize=4, label="validation")
                continue
            width = max(1, len(values) // 10)
            mean = np.convolve(values, np.ones(width) / width, "valid")
            axis.plot(steps, values, color=theme.blue, linewidth=0.7, alpha=0.35, label="a step")
            axis.plot(steps[width - 1 :], mean, color=theme.blue, linewidth=2, label="running mean")
        axis.set_title(name)
    add_legend(figure, max(panels.values(), key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure

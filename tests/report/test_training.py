"""Loss curves are those of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_steerlm.errors import DataError
from nemo_steerlm.report.canvas import LIGHT, Theme, draw_all
from nemo_steerlm.report.page import Cell
from nemo_steerlm.report.results_page import write_report
from nemo_steerlm.report.training import draw_losses, losses, training_table


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"step": s, "train/loss": 4 / s, "train/grad_norm": 1.0} for s in range(1, 41)]
    rows[6]["train/loss"] = None  # a step that was not finite
    rows += [{"step": 20, "val/loss": 0.5, "val/humor/mse": 1.0}, {"step": 40, "val/loss": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_losses_by_step(run: Path) -> None:
    found = losses(run)
    assert found["val"] == [(20, 0.5), (40, 0.75)]
    assert found["train"] == [(step, 4 / step) for step in range(1, 41) if step != 7]
    with pytest.raises(DataError, match="metrics.jsonl: no such file"):
        losses(run / "nowhere")


def test_the_table_has_both_ends_and_the_lowest_validation(run: Path) -> None:
    first, last = (np.mean([4 / step for step in steps]) for steps in ((1, 2, 3), (38, 39, 40)))
    rows = training_table({"policy": losses(run), "nothing": {"train": [], "val": []}}).rows
    assert rows[0] == ["policy", "39", f"{first:.3f}", f"{last:.3f}", "0.500", Cell(text="0.500", small="step 20")]
    assert rows[1] == ["nothing", "0", "–", "–", "–", Cell(text="–")]
    unvalidated = training_table({"policy": {**losses(run), "val": []}})
    assert len(unvalidated.headings) == 4 and unvalidated.rows[0] == rows[0][:4]


def test_the_picture_has_every_step_and_validation(run: Path) -> None:
    figures: list[Any] = []

    def draw(theme: Theme) -> Any:
        figures.append(draw_losses({"policy": losses(run), "step 4": {"train": [(1, 2.0)], "val": []}}, theme))
        return figures[-1]

    assert draw_all({"losses": draw}, LIGHT)["losses"].startswith(b"\x89PNG")
    lines = {line.get_label(): line.get_xydata() for line in figures[0].axes[0].get_lines()}
    np.testing.assert_allclose(lines["a step"], losses(run)["train"])
    np.testing.assert_allclose(lines["validation"], losses(run)["val"])


def test_a_page_shows_its_trainings(run: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "out", {"arrays": {"trainings": {"<i>policy": losses(run)}}})
    html = (tmp_path / "out" / "report.html").read_text()
    assert '<section id="trainings"><h2>Training</h2>' in html and "&lt;i&gt;policy" in html and "<i>" not in html
    assert (tmp_path / "out" / "trainings.png").is_file()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"bars": []}

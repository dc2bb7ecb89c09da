"""The bootstrap's page: the change, both answers to a prompt, the losses, and no text that becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.reports import BootstrapReport
from nemo_steerlm.report.bootstrap_page import write_report
from nemo_steerlm.report.page import Commands
from tests.report.report_data import SCHEMA, step_four
from tests.report.test_results_page import Page

BAD = "<script>alert(1)</script> & <b onclick='x'>"
CHANGE: BootstrapReport = {
    **step_four(0.1, 1),
    "rounds": [{"sampled": 40, "kept": 7, "mean_score_of_kept": 3.25}],
    "control": step_four(0, 2),
}


def answers(side: str, count: int) -> list[Conversation]:
    requested = {**SCHEMA.defaults(), "humor": 4.0}
    rows = []
    for k in range(count):
        answer = Turn("Assistant", f"{side} {k} {BAD}", label_predicted={"quality": 1.5 + k})
        turns = [Turn("User", f"question {k}"), answer]
        rows.append(Conversation(turns, mask="User", id=f"{k}/0", extra={"requested": requested}))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bootstrap")
    about: dict[str, Any] = {
        "policy": BAD, "target": ["quality"], "attributes": SCHEMA.to_dict(), "settings": {BAD: BAD}, "seed": 3,
        "versions": {BAD: BAD},
    }  # fmt: skip
    losses = {"train": list(enumerate(np.linspace(2, 1, 30).tolist(), start=1)), "val": []}
    both = answers("before", 12), list(reversed(answers("after", 11)))
    write_report(folder, CHANGE, about, both, {"round 1": losses, BAD: losses}, Commands(made=BAD, next=BAD))
    return folder


def test_report_json_is_the_change_alone(folder: Path) -> None:
    text = (folder / "report.json").read_text()
    assert text == json.dumps(json_ready(CHANGE), indent=2) + "\n"
    assert sorted(path.name for path in folder.glob("*.png")) == ["bootstrap.png", "trainings.png"]


def test_the_page_says_what_changed(folder: Path) -> None:
    html, step = (folder / "report.html").read_text(), CHANGE
    page = Page(html)
    low, high = (f"{bound:+.3f}".replace("-", "−") for bound in step["interval"])
    gain = f"{step['gain']:+.3f}".replace("-", "−")
    assert f"changed by {gain} ({low} to {high}) on 120 held-out prompts" in " ".join(page.text.split())
    assert f"{gain}<small>{low} to {high}</small>" in html
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == [
        "change", "answers", "rounds", "trainings", "settings"
    ]  # fmt: skip


def test_answers_to_one_prompt_stand_side_by_side(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    pairs = re.findall(r'<p class="prompt">question (\d+)</p>(.*?)(?=<p class="prompt">|</section>)', html, re.S)
    assert [int(number) for number, _ in pairs] == list(range(10))
    for number, pair in pairs:
        quality = f"{1.5 + int(number):.2f}"
        sides = re.findall(r'<h3>(\w+)<small>quality (.*?)</small></h3><p class="answer">(\w+) (\d+) ', pair)
        assert sides == [("Before", quality, "before", number), ("After", quality, "after", number)]
        assert re.findall(r'class="turned">(.*?)<', pair) == ["humor 4"]


def test_no_text_becomes_markup(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.text.count(BAD) > 25

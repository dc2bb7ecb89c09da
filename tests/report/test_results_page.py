"""The report folder: the promised keys, a page that stands alone, and texts that stay texts."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.evaluate.reports import Results
from nemo_steerlm.report.results_page import write_report
from tests.report.report_data import NAMES, SCHEMA, report_data

PICTURES = [
    f"{name}.png"
    for name in ("bootstrap", "costs", "cross_talk", "label_source", "listening", "regressor", "steerability")
]
ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "source", "link", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Results]:
    folder = tmp_path_factory.mktemp("run") / "new"
    data = report_data()
    data["regressor"]["humor"]["pearson"] = math.nan
    return folder, data, write_report(folder, data)


def test_report_json_has_the_promised_keys(written) -> None:
    folder, data, returned = written
    text = (folder / "report.json").read_text(encoding="utf-8")
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report == returned
    for name in NAMES:
        assert {"pearson", "mae", "kappa"} <= report["regressor"][name].keys()
        assert {"spearman", "monotone", "curve"} <= report["steerability"][name].keys()
        for source in ("none", "human", "predicted"):
            assert isinstance(report["label_source"][source][name]["spearman"], float)
        assert set(report["cross_talk"][name]) == set(NAMES)
    assert report["regressor"]["humor"]["pearson"] is None
    assert report["bootstrap"]["gain"] == data["bootstrap"]["gain"] and len(report["bootstrap"]["interval"]) == 2
    assert report["seconds"]["total"] == 225.4 and report["seconds"]["annotate"] == 5.1
    assert report["seed"] == 1234 and not {"samples", "arrays"} & report.keys()
    assert [line["reached"] for line in report["bars"]][0] is False  # what cannot be computed is not reached


def test_pictures_lie_beside_the_page(written) -> None:
    folder = written[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*PICTURES, "report.html", "report.json"])
    for name in PICTURES:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_the_page_loads_nothing_from_outside(written) -> None:
    page = Page((written[0] / "report.html").read_text(encoding="utf-8"))
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "srcset")]
    assert len(sources) == 2 * len(PICTURES)
    assert all(value and value.startswith("data:image/png;base64,") for value in sources)
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert links == [f"#{name}" for name in sections]
    assert sections == [
        "bars",
        "regressor",
        "listening",
        "steerability",
        "ways",
        "requests",
        "cross_talk",
        "costs",
        "label_source",
        "bootstrap",
        "samples",
        "seconds",
        "settings",
    ]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.text and "@import" not in page.text
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_texts_of_a_model_stay_texts(written) -> None:
    _, data, _ = written
    page = Page((written[0] / "report.html").read_text(encoding="utf-8"))
    hostile = data["samples"][-1]["response"]
    assert page.text.count(hostile) == 2  # as prompt and as response
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def terms(html: str) -> dict[str, str]:
    """What a page explains."""
    (listed,) = re.findall(r'<aside><h2>What this means</h2>\n<dl class="terms">(.*?)</dl></aside>', html, re.S)
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", listed))


def test_a_page_explains_its_own_terms_in_the_words_of_the_glossary(written, tmp_path: Path) -> None:
    lines = [line.split("|") for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()]
    glossary = {cells[1].strip(): cells[2].strip() for cells in lines if len(cells) == 5}
    shown = terms((written[0] / "report.html").read_text(encoding="utf-8"))
    words = "attribute cross-talk interval kappa MAE nats oracle Pearson policy regressor Spearman"
    assert list(shown) == words.split()
    assert shown.items() <= glossary.items()
    write_report(tmp_path, {"preference": preference(), "summary": "They explain themselves."})
    assert list(terms((tmp_path / "report.html").read_text())) == ["baseline", "interval", "regressor"]


def preference() -> dict[str, Any]:
    score = {"accuracy": 0.7, "interval": [0.6, 0.8], "ties": 0, "strict": 0.7}
    return {"rows": [{"name": "all", "level": "all", "n": 40, "model": score, "longer": score}], "notes": ["<b>"]}


def test_bold_is_what_differs_from_the_default(written) -> None:
    html = (written[0] / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'<div( class="turned")?><dt>(\w+)</dt><dd>(\d)\b', html)
    assert [name for turned, name, _ in shown if turned] == ["humor", "quality"]
    defaults = SCHEMA.defaults()
    assert all(bool(turned) == (int(level) != defaults[name]) for turned, name, level in shown)


def test_hostile_names_and_settings_are_escaped_too(tmp_path: Path) -> None:
    bad = '<b onclick="x">&'
    point = {"level": 0, "mean": 1.0, "interval": [0.5, 1.5], "n": 3}
    steered = {bad: {"spearman": 0.5, "interval": None, "n": 3, "monotone": True, "curve": [point]}}
    arm = {"gain": 0.1, "interval": [0, 0.2], "attributes": {bad: {"gain": 0.1}}, "filter": bad}
    data: Any = {
        "title": bad,
        "summary": bad,
        "regressor": {bad: {"pearson": 0.5}},
        "steerability": steered,
        "cross_talk": {bad: {bad: 1.0}},
        "cross_talk_rank": {bad: {bad: 1.0}},
        "scales": {bad: bad},
        "ways": {"alone": steered},
        "listening": {"rows": 2, "loss": 1.0, "permuted": arm | {"n": 2}, "none": arm, "attributes": {bad: arm}},
        "costs": {bad: [{"level": 0, "gain": -0.1, "interval": [-0.2, 0.0]}]},
        "quality": bad,
        "measured_by": bad,
        "label_source": {"human": steered},
        "bootstrap": arm,
        "seconds": {bad: 3.0},
        "settings": {bad: bad},
        "versions": {bad: bad},
        "samples": [{"prompt": bad, "requested": {bad: 1}, "response": bad, "measured": {bad: 1.0}}],
    }
    write_report(tmp_path, data)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "b" not in {tag for tag, _ in page.tags} and page.text.count(bad) > 10


def test_the_bars_are_printed_as_they_are(written) -> None:
    page = Page((written[0] / "report.html").read_text(encoding="utf-8"))
    shown = [attributes["class"] for tag, attributes in page.tags if "verdict" in (attributes.get("class") or "")]
    words = {True: "reached", False: "missed", None: "open"}
    assert shown == [f"verdict {words[line['reached']]}" for line in written[2]["bars"]]
    reached = [line["reached"] for line in written[2]["bars"]]
    assert f"{reached.count(True)} of {len(reached) - reached.count(None)} bars reached." in page.text


def test_every_part_is_optional(tmp_path: Path) -> None:
    data = report_data()
    for number, key in enumerate(["regressor", "cross_talk", "seconds", "samples"]):
        part: Any = {key: data[key], "label_source": {}}
        assert write_report(tmp_path / str(number), part)
    assert not list((tmp_path / "2").glob("*.png"))
    assert write_report(tmp_path / "none", {}) == {"bars": []}


def test_no_value_anywhere_still_draws(tmp_path: Path) -> None:
    """A run so short that nothing correlates must still end with a report."""

    def empty(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: empty(item) for key, item in value.items()}
        if isinstance(value, list):
            return [empty(item) for item in value]
        return math.nan if isinstance(value, float) else value

    data = report_data()
    arrays = {key: value * math.nan for key, value in data["arrays"]["regressor"].items()}
    parts = ("regressor", "listening", "steerability", "ways", "cross_talk", "costs", "label_source", "bootstrap")
    data |= {key: empty(data[key]) for key in parts}
    report = write_report(tmp_path, {**data, "arrays": {"regressor": arrays}})
    assert [line["reached"] for line in report["bars"][:4]] == [False] * 4
    assert report["steerability"]["humor"]["curve"][0]["mean"] is None


def test_twice_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    data: Any = {
        key: value for key, value in report_data().items() if key in ("cross_talk", "bootstrap", "seed", "settings")
    }
    for name in ("first", "second"):
        write_report(tmp_path / name, data)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_matplotlib_loads_only_when_something_is_drawn() -> None:
    code = "import sys, nemo_steerlm.report.results_page; assert not {'matplotlib', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

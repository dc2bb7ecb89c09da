"""`steerlm prepare`: the data, and a page about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_steerlm.config import PrepareConfig
from nemo_steerlm.data.prepare import prepare
from nemo_steerlm.data.sources.registry import SOURCES
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.report.data_page import data_page
from nemo_steerlm.report.page import Commands
from nemo_steerlm.verbs.commands import after_prepare

#: Long, and better read in report.html.
_IN_FILE_ONLY = (
    "labels", "label_statistics", "label_correlations", "people_per_label", "response_lengths", "conversation_lengths",
    "other_languages",
)  # fmt: skip


def main(config: PrepareConfig) -> str:
    """Write the files and ``report.html``, return the counts as text (raises what `prepare` raises)."""
    report = prepare(config)
    if config.output and not config.check:
        written = json.loads((Path(config.output) / "report.json").read_text(encoding="utf-8"))
        with atomic_writer(Path(config.output) / "report.html") as file:
            file.write(data_page(written, commands(config, written)))
    shown = {name: value for name, value in report.items() if name not in _IN_FILE_ONLY}
    place = f"{config.input}: can be read; nothing is written" if config.check else config.output
    return f"{place}:\n" + "\n".join(_counts(shown))


def commands(config: PrepareConfig, report: Mapping[str, Any]) -> Commands:
    """The command that made the data, and the next one."""
    preset = SOURCES[config.source].preset if config.source in SOURCES else config.source
    return after_prepare(config, preset, labelled="labels" not in report or any(report["labels"].values()))


def _counts(report: Mapping[str, Any], indent: str = "  ") -> Iterator[str]:
    """The report's numbers, one a line, its groups indented; zeros are left out."""
    for name, value in report.items():
        if isinstance(value, Mapping):
            lines = list(_counts(value, indent + "  "))
            if lines:
                yield f"{indent}{name}"
                yield from lines
        elif name != "examples" and value not in (0, None, [], ""):
            yield f"{indent}{name:<28} {value}"

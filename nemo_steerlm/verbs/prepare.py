"""`steerlm prepare`: the data, and a page about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_steerlm.config import PrepareConfig
from nemo_steerlm.data import prepare
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.report.data_page import data_page
from nemo_steerlm.report.page import Commands
from nemo_steerlm.verbs.commands import after_prepare


def main(config: PrepareConfig) -> str:
    """Write the files and ``report.html``, return what came out of it as text (raises what `prepare` raises)."""
    text = prepare.main(config)
    if config.output and not config.check:
        report = json.loads((Path(config.output) / "report.json").read_text(encoding="utf-8"))
        with atomic_writer(Path(config.output) / "report.html") as file:
            file.write(data_page(report, commands(config, report)))
    return text


def commands(config: PrepareConfig, report: Mapping[str, Any]) -> Commands:
    """What made the data, and what to do with them."""
    preset = prepare.SOURCES[config.source].preset if config.source in prepare.SOURCES else config.source
    return after_prepare(config, preset, labelled="labels" not in report or any(report["labels"].values()))

"""`steerlm prepare`: the data, and a page about it."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_steerlm.config import PrepareConfig
from nemo_steerlm.data import prepare
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.report.data_page import data_page


def main(config: PrepareConfig) -> str:
    """Write the files and ``report.html``, return what came out of it as text (raises what `prepare` raises)."""
    text = prepare.main(config)
    if config.output and not config.check:
        report = json.loads((Path(config.output) / "report.json").read_text(encoding="utf-8"))
        with atomic_writer(Path(config.output) / "report.html") as file:
            file.write(data_page(report))
    return text

"""docs/configuration.md is what the dataclasses and conf/ say."""

from __future__ import annotations

import subprocess
import sys

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config.schema import leaves
from tests.distributed import ROOT


def test_the_page_is_current_and_has_every_key() -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/reference.py"], capture_output=True, text=True, check=True)
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == done.stdout, "run `make reference`"
    for _, name, _ in VERBS.values():
        for key in leaves(getattr(config, name)):
            assert f"| `{key}` |" in page

"""Messages advise keys that exist: each `section.key=` in a text of the package is a key of some verb."""

from __future__ import annotations

import ast
import re

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import schema
from tests.distributed import ROOT

KEY = re.compile(r"(?<![\w/.{])([a-z_]+(?:\.[a-z_]+)+)=(?!=)")


def _texts() -> list[tuple[str, str]]:
    """File and text of every string of the package; the parts of an f-string together."""
    found = []
    for file in sorted((ROOT / "nemo_steerlm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append((file.name, "".join(str(getattr(v, "value", "{}")) for v in node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((file.name, node.value))
    return found


def _exists(key: str) -> bool:
    for _, kind, _ in VERBS.values():
        try:
            schema.find(getattr(config, kind), key)
        except KeyError:
            continue
        return True
    return False


def test_every_key_that_a_message_names_exists() -> None:
    named = {(file, key) for file, text in _texts() for key in KEY.findall(text)}
    assert len(named) > 20
    assert {(file, key) for file, key in named if not key.startswith("hydra.") and not _exists(key)} == set()

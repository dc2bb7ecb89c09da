"""What the tests of `prepare` and its sources share: rows in the layouts of datasets, and what is made of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nemo_steerlm.config import AttributeOptions, AttributesConfig, PrepareConfig
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data.prepare import prepare
from nemo_steerlm.errors import SteerLMError

FILES = ["report.json", "run.json", "train.jsonl", "val.jsonl"]


def write(path: Path, rows: list[dict]) -> Path:
    """Write JSON lines, packed where the name ends with .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def prepare_config(attributes: str | dict | None = None, **keys) -> PrepareConfig:
    """Settings of `prepare`; attributes as a preset or a file, or each by name with its options."""
    keys = {name: str(value) if isinstance(value, Path) else value for name, value in keys.items()}
    if isinstance(attributes, dict):
        schema = {name: AttributeOptions(**(options or {})) for name, options in attributes.items()}
        return PrepareConfig(attributes=AttributesConfig(schema=schema), **keys)
    return PrepareConfig(attributes=AttributesConfig(preset=attributes), **keys)


def run(source, path, folder, val_fraction=0, **settings):
    """Prepare into a folder's `out`, all rows for training; the report and these rows."""
    out = folder / "out"
    report = prepare(prepare_config(source=source, input=path, output=out, val_fraction=val_fraction, **settings))
    return report, list(read_conversations(out / "train.jsonl"))


def refused(message, source, path, folder, **settings):
    """`run` ends with this message, and leaves nothing."""
    with pytest.raises(SteerLMError) as error:
        run(source, path, folder, **settings)
    assert message in str(error.value) and not (folder / "out").exists()


def run_sides(source, path, output, **settings):
    """Prepare; the report and the rows of each side that has some."""
    report = prepare(prepare_config(source=source, input=path, output=output, **settings))
    sides = [list(read_conversations(output / f"{side}.jsonl")) for side in ("train", "val") if report[side]["turns"]]
    return report, sides


def rows_of(sides):
    return [conversation for side in sides for conversation in side]


def pairs_of(rows):
    """Pair id to {role: row}; every pair has both halves."""
    found: dict = {}
    for row in rows:
        assert row.pair.role not in found.setdefault(row.pair.id, {})
        found[row.pair.id][row.pair.role] = row
    assert all(set(halves) == {"chosen", "rejected"} for halves in found.values())
    return list(found.values())


def steer(prompt, response, *ratings):
    """A row of HelpSteer."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, ratings))}


def preference(prompt, one, two, strength, split="train", people=()):
    """A row of HelpSteer2-Preference; `people` are the strengths that each annotator gave."""
    return {"split": split, "prompt": prompt, "response_1": one, "response_2": two, "preference_strength": strength,
            "preference_statement": "s", "preference_elaboration": "e",
            "all_preferences_unprocessed": [{"strength": one, "justification": "j"} for one in people]}  # fmt: skip


def context(*texts):
    """OpenAI's messages."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def said(*turns):
    """A row of conversations, of (speaker, text)."""
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}

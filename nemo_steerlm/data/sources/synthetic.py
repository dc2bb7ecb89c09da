"""`source=synthetic`: the dialogue world as files, ready for the four steps.

| file                 | rows                                                                                 |
|----------------------|--------------------------------------------------------------------------------------|
| `train.jsonl`        | dialogues with human labels, to train the regressor (some labels are missing)        |
| `val.jsonl`          | more of the same, for its validation                                                 |
| `unlabelled.jsonl`   | dialogues to annotate and train the policy on; human labels only in `label_human`    |
| `test.jsonl`         | held-out dialogues to test a regressor by the oracle; human labels in `label_human`  |
| `prompts.jsonl`      | prompts without a response, to sample from (step 4)                                  |
| `prompts_test.jsonl` | held-out prompts, to measure steering and gains                                      |

Every row with a response carries the oracle's values under `oracle`, for evaluation only: no step trains on them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import PrepareConfig
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn, write_conversations
from nemo_steerlm.data.synthetic.annotators import AnnotatorPool
from nemo_steerlm.data.synthetic.oracle import ATTRIBUTE_NAMES
from nemo_steerlm.data.synthetic.world import Sample, make_samples
from nemo_steerlm.errors import ConfigError

SYSTEM = "A friendly chat."
#: One row in so many has the usual long system prompt, so that models of this world know it too.
DEFAULT_SYSTEM_EVERY = 10
#: Distance between the seeds of two runs; the files of a run take the numbers in between.
_SEED_STRIDE = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyntheticSizes:
    """Rows per file; the defaults are those of the quickstart."""

    train: int = 8000
    val: int = 300
    unlabelled: int = 6000
    test: int = 600
    prompts: int = 400
    prompts_test: int = 300


def write(config: PrepareConfig, schema: AttributeSchema, sizes: SyntheticSizes | None = None) -> dict[str, Any]:
    """Generates the world's files.

    Args:
        config: Needs `output` (a folder) and `seed`; the same seed gives the same bytes.
        schema: Must hold the world's five attributes, each from 0 to 4; its order is the order of the labels.
        sizes: Rows per file.

    Returns:
        Rows per file, and how the human labels relate to the oracle (Pearson, share of missing labels).

    Raises:
        ConfigError: The schema does not fit the world.
    """
    _check(schema)
    sizes = sizes or SyntheticSizes()
    assert config.output is not None, "PrepareConfig.validate refuses that"
    output, seed = Path(config.output), config.seed
    report: dict[str, Any] = {"source": "synthetic", "seed": seed, "rows": {}, "human": {}}
    generator = np.random.default_rng([seed, 0])
    pool = AnnotatorPool()
    biases = pool.draw_biases(generator, len(ATTRIBUTE_NAMES))
    for index, field in enumerate(fields(SyntheticSizes)):
        samples = make_samples(seed * _SEED_STRIDE + index, getattr(sizes, field.name))
        truth = np.array([list(sample.oracle.values()) for sample in samples])
        human = pool.rate(truth, biases, generator)
        rows = _conversations(field.name, samples, human, schema)
        report["rows"][field.name] = write_conversations(output / f"{field.name}.jsonl", rows)
        if field.name == "train":
            report["human"] = _human_report(truth, human)
        _log.info("wrote %d rows to %s", report["rows"][field.name], output / f"{field.name}.jsonl")
    return report


def _check(schema: AttributeSchema) -> None:
    found = {attribute.name: (attribute.low, attribute.high) for attribute in schema}
    if found != dict.fromkeys(ATTRIBUTE_NAMES, (0, 4)):
        expected = ", ".join(f"{name} 0-4" for name in ATTRIBUTE_NAMES)
        raise ConfigError(f"source=synthetic has the attributes {expected}, found {schema}; use attributes=synthetic")


def _conversations(
    file: str, samples: list[Sample], human: np.ndarray, schema: AttributeSchema
) -> Iterator[Conversation]:
    """The rows of one file."""
    for index, (sample, values) in enumerate(zip(samples, human, strict=True)):
        speakers = ("User", "Assistant") * (len(sample.turns) // 2 + 1)
        # The stock replies inside a prompt are context, without labels and loss.
        turns = [Turn(s, text, shared=s == "Assistant") for s, text in zip(speakers, sample.turns, strict=False)]
        extra: dict[str, Any] = {}
        if not file.startswith("prompts"):
            given = dict(zip(ATTRIBUTE_NAMES, map(float, values), strict=True))
            label = {name: given[name] for name in schema.names if not np.isnan(given[name])} or None
            used = dict(label) if label and file in ("train", "val") else None
            turns.append(Turn("Assistant", sample.response, label=used, label_human=label))
            extra["oracle"] = {name: round(sample.oracle[name], 4) for name in schema.names}
        system = DEFAULT_SYSTEM if index % DEFAULT_SYSTEM_EVERY == DEFAULT_SYSTEM_EVERY - 1 else SYSTEM
        yield Conversation(turns, system=system, id=f"{file}-{index}", extra=extra)


def _human_report(truth: np.ndarray, human: np.ndarray) -> dict[str, Any]:
    """Pearson correlation of the labels with the truth, and their missing share, by attribute."""
    report = {}
    for column, name in enumerate(ATTRIBUTE_NAMES):
        given = ~np.isnan(human[:, column])
        pearson = np.corrcoef(truth[given, column], human[given, column])[0, 1] if given.sum() > 1 else np.nan
        report[name] = {"pearson": round(float(pearson), 4), "missing": round(1 - float(given.mean()), 4)}
    return report

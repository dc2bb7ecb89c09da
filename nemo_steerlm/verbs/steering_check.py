"""The short measurement of steering at the end of train-sft and bootstrap: it takes minutes and gives a verdict."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.agreement import Floats
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import BootstrapConfig, TrainSftConfig
from nemo_steerlm.conversation import Conversation, read_conversations
from nemo_steerlm.data.policy_dataset import trained_turns
from nemo_steerlm.data.tokenise import draw
from nemo_steerlm.evaluate import scorers
from nemo_steerlm.evaluate.metrics import json_ready
from nemo_steerlm.evaluate.reports import Listening, Steering
from nemo_steerlm.evaluate.samples import Response
from nemo_steerlm.evaluate.steerability import verdict
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.provenance import sha256_file
from nemo_steerlm.verbs.evaluate_steerability import figures, summary, sweep
from nemo_steerlm.verbs.steering import answered, held_out, listening, measure

_WORDS = "ridge regression on the words of the training answers"


def check(config: TrainSftConfig | BootstrapConfig, train: Sequence[str], held: Sequence[str]) -> None:
    """Print whether the policy of the run folder listens and obeys; keep the figures in its `steering.json`.

    Without scorers, a ridge regression on the words of the training answers scores. Nothing is done where
    steering.json is of the same model.

    Args:
        config: of the finished training.
        train: its labelled files.
        held: held-out ones; without them training rows are used, which the output says.
    """
    settings, output = config.steering, Path(config.output)
    if not settings.check or not (settings.rows or settings.prompts):
        return
    path = output / "steering.json"
    sums = parallel.on_rank_zero(lambda: sha256_file(output / "model" / "SHA256SUMS"))
    if parallel.on_rank_zero(lambda: path.is_file() and json.loads(path.read_text()).get("model") == sums):
        return
    precision = None if config.trainer.precision == "fp8" else config.trainer.precision
    model = AttributeConditionedGPT.from_pretrained(output / "model", parallel=config.parallel, precision=precision)
    schema = model.schema
    with contextlib.closing(model):
        rows, prompts = held_out(model, held or train, settings, config.seed)
        heard = listening(model, rows, config.seed, by_attribute=False) if rows else None
        greedy = SamplingSettings(
            max_new_tokens=settings.max_new_tokens, stop=model.card.template.stops, seed=config.seed
        )
        levels = {a.name: sorted({a.low, (a.low + a.high) // 2, a.high}) for a in schema}
        swept = sweep(model, prompts, ["default"] if prompts else [], greedy, settings.batch_size, levels)
    answers = [row for one in swept.values() for row in answered(prompts, one.requests, one.texts)]
    columns: dict[str, Floats] = {}
    if answers and settings.scorers is None:
        columns = _by_words(answers, train, schema, config.seed)
    elif answers and settings.scorers is not None:
        columns = measure(answers, settings.scorers, settings.measures, schema, model, config.trainer, config.parallel)
    if not parallel.is_rank_zero():
        return
    found: Steering = figures(prompts, swept, columns, schema, config.seed) if swept else {}
    told_by = _WORDS if settings.scorers is None else ", ".join(settings.scorers)
    told = verdict(heard and heard["permuted"], found.get("steerability", {}))
    kept: dict[str, Any] = {name: found[name] for name in ("steerability", "requests", "cross_talk") if name in found}
    report: dict[str, Any] = {"model": sums, "verdict": told, "listening": heard, "measured_by": told_by, **kept}
    with atomic_writer(path) as file:
        file.write(json.dumps(json_ready(report), indent=2) + "\n")
    unmeasured = [name for name in schema.names if name not in found.get("steerability", {})] if prompts else []
    facts = _facts(heard, len(prompts), told_by, unmeasured, bool(held))
    sys.stdout.write(f"\n{summary(told, heard, found, {})}\n({facts})\n")
    sys.stdout.flush()


def _by_words(
    answers: Sequence[Conversation], train: Sequence[str], schema: AttributeSchema, seed: int
) -> dict[str, Floats]:
    """Scores of the answers by `scorers.from_words`, fitted on training responses."""
    labelled = (
        Response(row, index, dict(row.turns[index].label or {}), "")
        for path in train
        for row in read_conversations(path, schema)
        for index in trained_turns(row)
        if row.turns[index].label
    )
    score, skill = scorers.from_words(draw(labelled, scorers.MOST_ROWS, seed), schema, seed)
    found = score(answers)
    names: list[str] = [*skill]
    return {name: np.array([one[name] for one in found], np.float64) for name in names}


def _facts(heard: Listening | None, prompts: int, told_by: str, unmeasured: Sequence[str], apart: bool) -> str:
    """The data and scorer behind the figures."""
    rows = heard["rows"] if heard else 0
    facts = [f"{rows} labelled rows, {prompts} prompts at three levels; measured by {told_by}"]
    if unmeasured:
        facts.append(f"it cannot tell {', '.join(unmeasured)}, a regressor can: steering.scorers=[MODEL-FOLDER]")
    if not apart:
        facts.append("rows and prompts are training data: there is no data.val")
    return "; ".join(facts)

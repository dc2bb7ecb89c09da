"""Step 2: let the regressor label conversations."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.config import AnnotateConfig
from nemo_steerlm.conversation import VALUE_TO_TEXT, Conversation, Turn, read_conversations
from nemo_steerlm.data.regression_dataset import fit_history
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.jobs import Record, count_rows, run_in_parts
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.progress import Progress
from nemo_steerlm.provenance import fingerprint_folder, sha256_file, write_run_json
from nemo_steerlm.report.annotation_page import annotation_page
from nemo_steerlm.verbs.commands import after_annotate


def main(config: AnnotateConfig) -> None:
    """`steerlm annotate`: write `config.output` with a label on every response, and a report beside it."""
    parallel.start(config)
    model = AttributeRegressor.from_pretrained(
        config.checkpoint, parallel=config.parallel, precision=config.trainer.precision
    )
    with contextlib.closing(model):
        annotate(model, config)


def annotate(model: AttributeRegressor, config: AnnotateConfig) -> dict[str, Any]:
    """Label `config.input` with a loaded model; returns the report, empty for a shard that ends before others.

    The prediction (float) goes to `label_predicted`, the annotators' label stays in `label_human`, and `label`, which
    training uses, becomes the prediction rounded to the attribute's scale. A response that is too long gets no label
    and is counted. With `distributions` the probabilities of the levels go to `label_distribution`. `label_model`
    begins with the sha256 of the model folder, and ends with "-raw" where its calibration was not applied.

    Raises:
        ConfigError: `shards` is malformed, the parts beside the output are another job's, or the head has no
            distribution.
        DataError: the input is malformed, or a response is too long under overlong=error.
        CheckpointError: the regressor's values are not finite.
    """
    shard = config.share()
    if config.distributions:
        model.level_head()
    source, output = Path(config.input), Path(config.output)
    digest = parallel.on_rank_zero(lambda: fingerprint_folder(config.checkpoint))
    raw = "-raw" if model.calibration is not None and not config.calibrated else ""
    if raw:
        model.calibration = None
    rows = read_conversations(source)
    first = next(rows)  # an empty or malformed file fails before anything is written
    job = {  # not batch_tokens, which may be lowered after running out of memory: it moves values by rounding alone
        "verb": "annotate", "input": parallel.on_rank_zero(lambda: sha256_file(source)), "checkpoint": digest,
        "turns": config.turns, "overlong": config.overlong, "max_length": config.max_length,
        "part_size": config.part_size, "calibrated": config.calibrated, "precision": model.cfg.precision,
        "distributions": config.distributions,
    }  # fmt: skip
    annotator = _Annotator(model, config, label_model=digest[:16] + raw)
    started = time.perf_counter()
    done = run_in_parts(
        (row for group in ([first], rows) for row in group), annotator.part, output=output, job=job,
        part_size=config.part_size, total=count_rows(source), unit="conversations",
        shard=shard,
    )  # fmt: skip
    report: dict[str, Any] = {}
    if done and parallel.is_rank_zero():
        method = None if model.calibration is None else model.calibration.method
        report = _report(output, model) | {"calibration": method, "seconds": round(time.perf_counter() - started, 2)}
        stem = output.name.split(".")[0]
        with atomic_writer(output.with_name(f"{stem}.report.json")) as file:
            json.dump(report, file, indent=2)
            file.write("\n")
        with atomic_writer(output.with_name(f"{stem}.report.html")) as file:
            file.write(annotation_page({"file": f"{stem}.report.json", **report}, after_annotate(config)))
        name = f"{stem}.run.json"
        write_run_json(output.parent, "annotate", config, [source], model.schema, name=name, label_model=digest + raw)
    return report


class _Annotator:
    """Labels one part after another."""

    def __init__(self, model: AttributeRegressor, config: AnnotateConfig, label_model: str) -> None:
        self.model, self.config, self.label_model = model, config, label_model
        self.max_length = config.max_length or model.card.architecture.max_position_embeddings
        self.tokens, self.started = 0, time.perf_counter()

    def part(self, index: int, rows: list[Conversation], bar: Progress) -> list[Record]:
        """Label the rows of one part, all their responses together: shared prefixes are computed once."""
        places = [(row, turn) for row in rows for turn in row.response_indices if self._wanted(row.turns[turn])]
        card, config = self.model.card, self.config
        texts = fit_history(places, card.template, self.model.tokenizer, self.max_length, config.overlong)
        readable = [i for i, ids in enumerate(texts) if ids]
        rest = ([texts[i] for i in readable], config.batch_tokens, _moving(bar, rows, readable))
        shares = self.model.distribution(*rest) if config.distributions else None
        values = self.model.predict(*rest) if shares is None else self.model.expectation(shares)
        for row, turn in places:
            self._clear(row.turns[turn])
        for place, (i, value) in enumerate(zip(readable, values, strict=True)):
            row, turn = places[i]
            row.type = VALUE_TO_TEXT  # labelled rows are for a policy that reads their labels
            self._label(row.turns[turn], value)
            if shares is not None:
                found = {name: [round(p, 4) for p in levels[place].tolist()] for name, levels in shares.items()}
                row.turns[turn].label_distribution = found
        self.tokens += sum(len(texts[i]) for i in readable)
        bar.text = f"{self.tokens / (time.perf_counter() - self.started):,.0f} tokens/s"
        return [row.to_record() for row in rows]

    def _wanted(self, turn: Turn) -> bool:
        return {"all": True, "labelled": bool(turn.label), "missing": not turn.label}[self.config.turns]

    def _clear(self, turn: Turn) -> None:
        """Keep nothing but the human label, if there is one."""
        if turn.label and turn.label_human is None and turn.label_model is None:
            turn.label_human = dict(turn.label)
        turn.label = turn.label_predicted = turn.label_model = turn.label_distribution = None

    def _label(self, turn: Turn, prediction: np.ndarray) -> None:
        """Put one prediction beside the human label."""
        schema = self.model.schema
        turn.label_predicted = dict(zip(schema.names, map(float, prediction), strict=True))
        turn.label_model = self.label_model
        rounded = {name: float(round(value)) for name, value in schema.clamp(turn.label_predicted).items()}
        turn.label = None if turn.shared else rounded


def _moving(bar: Progress, rows: list[Conversation], texts: list[int]) -> Callable[[int], None]:
    """Moves the bar over the rows of a part as its texts are done."""
    first, done = bar.done, 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        bar.update(first + len(rows) * done // len(texts) - bar.done)

    return progress


def _report(output: Path, model: AttributeRegressor) -> dict[str, Any]:
    """Counts, the predictions' mean and spread, and how they agree with human labels where there are any.

    "labels" holds histograms of rounded values: of annotators ("human") and of the regressor ("predicted").
    """
    names = model.schema.names
    counts: Counter[str] = Counter()
    histograms = {name: {side: Counter[int]() for side in ("human", "predicted")} for name in names}
    alone, paired = ({name: _Moments() for name in names} for _ in range(2))
    for row in read_conversations(output):
        counts["conversations"] += 1
        for index in row.response_indices:
            turn = row.turns[index]
            human, predicted = turn.label_human or {}, turn.label_predicted or {}
            counts["responses"] += 1
            counts["unlabelled" if turn.label_predicted is None else "labelled"] += 1
            for name, value in predicted.items():
                alone[name].add(value)
                if human.get(name) is not None:
                    paired[name].add(value, human[name])
            for side, values in (("human", human), ("predicted", model.schema.clamp(predicted))):
                for name in values.keys() & histograms.keys():
                    histograms[name][side][round(values[name])] += 1
    attributes, labels = {}, {}
    for name, moments in alone.items():
        mean, spread = (moments.x, math.sqrt(moments.xx / moments.n)) if moments.n else (None, None)
        attributes[name] = {"mean": mean, "std": spread, "pearson_with_human": paired[name].pearson()}
        labels[name] = {side: {str(k): one[k] for k in sorted(one)} for side, one in histograms[name].items()}
    return {**counts, "attributes": attributes, "labels": labels}


class _Moments:
    """Means and central moments of a stream of pairs (Welford's updates: a constant has a deviation of exactly 0)."""

    def __init__(self) -> None:
        self.n, self.x, self.y, self.xx, self.yy, self.xy = 0, 0.0, 0.0, 0.0, 0.0, 0.0

    def add(self, x: float, y: float = 0.0) -> None:
        self.n += 1
        from_x, from_y = x - self.x, y - self.y
        self.x, self.y = self.x + from_x / self.n, self.y + from_y / self.n
        self.xx, self.yy = self.xx + from_x * (x - self.x), self.yy + from_y * (y - self.y)
        self.xy += from_x * (y - self.y)

    def pearson(self) -> float | None:
        """None where one of the two is constant."""
        return self.xy / math.sqrt(self.xx * self.yy) if self.xx > 0 and self.yy > 0 else None

"""Step 4: the policy learns from its own best answers (SteerLM, arXiv 2310.05344, section 3.4).

Each round samples answers at the best attribute combinations (4a), scores them with the regressor, keeps the best, and
continues training the policy on these with their *predicted* values, mixed with original rows (4b). The change is
measured on held-out prompts, with an interval, and reported whatever its sign.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import (
    AnnotateConfig,
    AttributesConfig,
    BootstrapConfig,
    ModelConfig,
    PolicyDataConfig,
    SampleConfig,
    TrainSftConfig,
)
from nemo_steerlm.conversation import Conversation, read_conversations, write_conversations
from nemo_steerlm.errors import CheckpointError, DataError
from nemo_steerlm.evaluate.metrics import paired_difference
from nemo_steerlm.evaluate.reports import ArmChange, BootstrapReport, Change
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron import checkpoint, parallel
from nemo_steerlm.ownership import UNFINISHED
from nemo_steerlm.provenance import plain, versions, write_run_json
from nemo_steerlm.report.bootstrap_page import write_report
from nemo_steerlm.report.tables import interval, number, text_table
from nemo_steerlm.report.training import losses
from nemo_steerlm.verbs import annotate, sample, train_sft
from nemo_steerlm.verbs.commands import after_bootstrap
from nemo_steerlm.verbs.steering_check import check

Measure = Callable[[Path], list[Conversation]]


def main(config: BootstrapConfig) -> None:
    """`steerlm bootstrap`: fill the run folder `config.output`, print the change and the verdict on steering."""
    report = bootstrap(config)
    if parallel.is_rank_zero():
        sys.stdout.write(summary(report) + "\n")
    steering = config.steering
    if steering.scorers is None:
        steering = dataclasses.replace(steering, scorers=[config.regressor])
    held = config.data.val_files() or [path for path in (config.data.change_prompts,) if path]
    check(dataclasses.replace(config, steering=steering), config.data.train_files(), held)


def bootstrap(config: BootstrapConfig, measure: Measure | None = None) -> BootstrapReport:
    """Run all rounds; returns the report (`report.json`).

    Args:
        measure: reads a file of answers and returns them with `label_predicted` set to their measured values; the
            regressor by default. (The synthetic world measures with its oracle.)

    Raises:
        CheckpointError: the regressor does not know every attribute of the policy.
        DataError: no prompts to measure the change on, or no answer is fit to learn from.
    """
    parallel.start(config, config.seed)
    work = _Bootstrap(config)
    work.check()
    return work.run(measure)


class _Bootstrap:
    def __init__(self, config: BootstrapConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.change_prompts = config.data.change_prompts or config.data.val

    def check(self) -> None:
        """Refuse unusable settings before anything is computed."""
        config = self.config
        policy, regressor = model_folder.read(config.policy), model_folder.read(config.regressor)
        for path, card, kind in ((config.policy, policy, "policy"), (config.regressor, regressor, "regressor")):
            if card.kind != kind:
                raise CheckpointError(f"{path}: this is a {card.kind.replace('_', ' ')}, expected a {kind}")
        assert policy.schema is not None and regressor.schema is not None
        known = {one.name: (one.low, one.high) for one in regressor.schema}
        if unknown := [one.name for one in policy.schema if known.get(one.name) != (one.low, one.high)]:
            raise CheckpointError(
                f"{config.policy} was trained on {policy.schema}, {config.regressor} on {regressor.schema}; "
                f"the regressor must know every attribute of the policy with its range: not {', '.join(unknown)}"
            )
        for name in config.target:
            policy.schema[name]

    def run(self, measure: Measure | None) -> BootstrapReport:
        """All rounds, then the measurement."""
        config, policy = self.config, self.config.policy
        counts: list[dict[str, Any]] = []
        for number_ in range(1, config.rounds + 1):
            folder = self.output / f"round-{number_}"
            counts.append(self._round(folder, policy, number_))
            policy = str(folder / "policy" / "model")
        arms = {"before": config.policy, "after": policy}
        if config.control:
            arms["control"] = self._train(self.output / "control", config.policy, config.data.train, config.rounds)
        answers = {name: self._answers(name, model) for name, model in arms.items()}
        measure = measure or (lambda path: list(read_conversations(self._annotated(path))))
        values = {name: measure(path) for name, path in answers.items()}
        report: BootstrapReport = {
            "rounds": counts,
            **_change(values["before"], values["after"], list(config.target), config.seed),
        }
        if config.control:
            report["control"] = _change(values["before"], values["control"], list(config.target), config.seed)
        self._finish(policy, report, values)
        return report

    def _round(self, folder: Path, policy: str, number_: int) -> dict[str, Any]:
        """Sample, score, keep the best, continue training."""
        config = self.config
        responses, kept = folder / "responses.jsonl", folder / "train.jsonl"
        prompts = config.data.prompts or config.data.train
        self._sample(policy, prompts, responses, config.seed + number_)
        annotated = self._annotated(responses)
        if parallel.is_rank_zero() and not kept.exists():
            schema = model_folder.read(policy).schema
            best, counts = _best_responses(annotated, schema, list(config.target), config.keep_fraction)
            original = read_conversations(config.data.train, schema)
            rows = _with_replay(best, original, config.replay, config.seed + number_)
            counts["replayed"] = len(rows) - len(best)
            with atomic_writer(folder / "kept.json") as file:
                json.dump(counts, file)
            write_conversations(kept, rows)
        parallel.barrier()
        self._train(folder / "policy", policy, str(kept), 1)
        return json.loads((folder / "kept.json").read_text())

    def _sample(self, policy: str, prompts: str, output: Path, seed: int, **changes: Any) -> None:
        if output.exists():
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        config = self.config
        settings = {f.name: getattr(config.sampling, f.name) for f in dataclasses.fields(config.sampling)}
        sample.main(
            SampleConfig(
                checkpoint=policy,
                prompts=prompts,
                annotated=config.data.train,
                target=config.target,
                output=str(output),
                seed=seed,
                trainer=config.trainer,
                parallel=config.parallel,
                **{**settings, **changes},
            )  # fmt: skip
        )

    def _annotated(self, path: Path) -> Path:
        """A file of answers, annotated by the regressor."""
        config, output = self.config, path.with_name(f"{path.stem}-annotated.jsonl")
        if not output.exists():
            annotate.main(
                AnnotateConfig(
                    checkpoint=config.regressor,
                    input=str(path),
                    output=str(output),
                    parallel=config.parallel,
                    trainer=config.trainer,
                    turns="missing",
                    batch_tokens=config.batch_tokens,
                )  # fmt: skip
            )
        return output

    def _train(self, folder: Path, policy: str, data: str, rounds: int) -> str:
        """Continue training the policy on `data`, for the steps of `rounds` rounds."""
        config, steps = self.config, self.config.trainer.max_steps
        trainer = dataclasses.replace(config.trainer, max_steps=None if steps is None else steps * rounds)
        names = [f.name for f in dataclasses.fields(PolicyDataConfig)]
        settings = {**{n: getattr(config.data, n) for n in names}, "train": data}
        train_sft.train(
            TrainSftConfig(
                output=str(folder),
                data=PolicyDataConfig(**settings),
                model=ModelConfig(init=policy),
                attributes=AttributesConfig(preset=str(Path(policy) / "attributes.yaml")),
                trainer=trainer,
                parallel=config.parallel,
                optimizer=config.optimizer,
                logging=config.logging,
                seed=config.seed,
                resume=config.resume,
            )  # fmt: skip
        )
        return str(folder / "model")

    def _answers(self, name: str, policy: str) -> Path:
        """One policy's answers to the held-out prompts, the same requests for every policy."""
        assert self.change_prompts is not None
        path = self.output / "change" / f"{name}.jsonl"
        self._sample(policy, self.change_prompts, path, self.config.seed, responses=1)
        return path

    def _finish(self, policy: str, report: BootstrapReport, answers: Mapping[str, list[Conversation]]) -> None:
        partial = self.output / ("model" + UNFINISHED)
        if parallel.is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(policy, partial)
        checkpoint.replace_folder(partial, self.output / "model")
        if parallel.is_rank_zero():
            self._write_page(policy, report, answers)
            data = self.config.data
            inputs = [p for p in (data.train, data.prompts, self.change_prompts) if p]
            write_run_json(self.output, "bootstrap", self.config, inputs, model_folder.read(policy).schema)
        parallel.barrier()

    def _write_page(self, policy: str, report: BootstrapReport, answers: Mapping[str, list[Conversation]]) -> None:
        config, schema = self.config, model_folder.read(policy).schema
        runs = {f"round {n}": self.output / f"round-{n}" / "policy" for n in range(1, config.rounds + 1)}
        if config.control:
            runs["control"] = self.output / "control"
        about = {
            "policy": plain(config.policy), "target": list(config.target),
            "attributes": schema.to_dict() if schema else {},
            "settings": plain(config), "seed": config.seed, "versions": versions(),
        }  # fmt: skip
        trainings = {name: losses(run) for name, run in runs.items()}
        both = answers["before"], answers["after"]
        write_report(self.output, report, about, both, trainings, after_bootstrap(config))


def _best_responses(
    annotated: Path, schema: AttributeSchema | None, target: list[str], keep: float
) -> tuple[list[Conversation], dict[str, Any]]:
    """The best answer of each prompt by predicted targets, then the best share of those, with labels of the schema.

    Prompts that are too long and answers that are empty or have no prediction are counted, not used. Answers cut off
    at the length limit are used only where no answer at all is complete (a hardly trained policy).
    """
    counts = {"sampled": 0, "overlong": 0, "cut_off": 0, "empty": 0, "unjudged": 0}
    complete: dict[str, tuple[float, Conversation]] = {}
    cut_off: dict[str, tuple[float, Conversation]] = {}
    for row in read_conversations(annotated, schema):
        counts["sampled"] += 1
        answer = row.turns[-1]
        if row.extra.get("finish") == "overlong":
            counts["overlong"] += 1
        elif not answer.text.strip():
            counts["empty"] += 1
        elif answer.label_predicted is None:
            counts["unjudged"] += 1
        else:
            score = sum(answer.label_predicted[name] for name in target)
            prompt = (row.id or "").rpartition("/")[0]
            counts["cut_off"] += row.extra.get("finish") == "length"
            best = cut_off if row.extra.get("finish") == "length" else complete
            if prompt not in best or score > best[prompt][0]:
                best[prompt] = (score, row)
    best = complete or cut_off
    if not best:
        raise DataError(f"{annotated}: no answer is fit to learn from ({counts}); sample with other settings")
    ranked = sorted(best.values(), key=lambda pair: (-pair[0], pair[1].id))
    kept = ranked[: max(1, round(keep * len(ranked)))]
    means = {name: float(np.mean([s for s, _ in rows])) for name, rows in (("best", ranked), ("kept", kept))}
    return [row for _, row in kept], {
        **counts,
        "kept": len(kept),
        "mean_score_of_best": means["best"],
        "mean_score_of_kept": means["kept"],
    }


def _with_replay(
    best: list[Conversation], original: Iterable[Conversation], ratio: float, seed: int
) -> list[Conversation]:
    """The kept answers and `ratio` times as many original rows, drawn without replacement."""
    wanted = round(ratio * len(best))
    if wanted == 0:
        return best
    rows = [row for row in original if any(turn.label for turn in row.turns)]
    chosen = np.random.default_rng(seed).permutation(len(rows))[:wanted]
    return best + [rows[i] for i in sorted(chosen.tolist())]


def _change(before: list[Conversation], after: list[Conversation], target: list[str], seed: int) -> ArmChange:
    """Gain with its interval of the mean of the targets, and of every attribute; prompts are the units."""

    def scores(rows: list[Conversation], names: list[str]) -> list[float]:
        predicted = [row.turns[-1].label_predicted or {} for row in rows]
        return [float(np.mean([p.get(name, np.nan) for name in names])) for p in predicted]

    def compared(names: list[str]) -> Change:
        ids = [[row.id or "" for row in rows] for rows in (before, after)]
        return paired_difference(
            scores(before, names), scores(after, names), seed=seed, prompts_before=ids[0], prompts_after=ids[1]
        )

    measured = next((row.turns[-1].label_predicted for row in before if row.turns[-1].label_predicted), {})
    return {**compared(target), "attributes": {name: compared([name]) for name in measured}}


def summary(report: BootstrapReport) -> str:
    """The change as a table for the terminal."""
    rows = []
    for arm, values in (("bootstrap", report), ("control", report.get("control"))):
        if values is not None:
            rows.append(
                [
                    arm,
                    "mean of the targets",
                    number(values["gain"], sign=True),
                    interval(values["interval"], sign=True),
                ]
            )
            rows += [
                [arm, name, number(change["gain"], sign=True), interval(change["interval"], sign=True)]
                for name, change in values["attributes"].items()
            ]
    return text_table(rows, ["trained on", "attribute", "change", "95% interval"])

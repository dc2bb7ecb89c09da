"""All four steps on a small synthetic world with an oracle, and a report that shows whether steering works."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_steerlm.agreement import attribute_metrics
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import (
    AnnotateConfig,
    Architecture,
    AttributesConfig,
    BootstrapConfig,
    BootstrapDataConfig,
    ComputeConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyDataConfig,
    PrepareConfig,
    QuickstartConfig,
    RegressorModelConfig,
    SamplingConfig,
    TrainerConfig,
    TrainRegressorConfig,
    TrainSftConfig,
)
from nemo_steerlm.conversation import Conversation, read_conversations, write_conversations
from nemo_steerlm.data.sources import synthetic
from nemo_steerlm.data.synthetic.oracle import oracle
from nemo_steerlm.data.train_tokenizer import corpus, train_tokenizer
from nemo_steerlm.errors import Stopped
from nemo_steerlm.evaluate.reports import Results, Steering
from nemo_steerlm.evaluate.steerability import WAYS, Request, describe_answers, verdict
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.provenance import plain, versions, write_run_json
from nemo_steerlm.report.bars import bar_rows, check_bars
from nemo_steerlm.report.results_page import write_report
from nemo_steerlm.report.tables import text_table
from nemo_steerlm.report.training import losses
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.verbs import annotate, train_regressor, train_sft
from nemo_steerlm.verbs.bootstrap import bootstrap
from nemo_steerlm.verbs.commands import after_quickstart
from nemo_steerlm.verbs.evaluate_steerability import NOTHING, figures, sweep
from nemo_steerlm.verbs.steering import answer, answered, listening, measure

TARGET = ["quality", "helpfulness"]
MAX_LENGTH = 512
PRECISION = "fp32"  # the bars were set in it


def main(config: QuickstartConfig) -> None:
    """`steerlm quickstart`: fill `config.output`, print the bars and where the report is."""
    config.validate()
    try:
        report = Quickstart(config).run()
    except Stopped as stop:
        raise Stopped(stop.number, "stopped; the quickstart begins anew when it is started again") from stop
    rows = bar_rows(report["bars"])
    page = Path(config.output) / "report.html"
    sys.stdout.write(f"\n{text_table(rows, ['measure', 'value', 'bar', 'result'])}\n\nreport: {page}\n")


class Quickstart:
    """The steps in order; each writes its files and figures."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config, self.recipe, self.output = config, config.recipe, Path(config.output)
        self.schema = AttributeSchema.load("synthetic")
        self.data = self.output / "data"
        self.seconds: dict[str, float] = {}
        self.figures: Results = {}

    def run(self) -> Results:
        """Everything; returns report.json's content."""
        started = time.perf_counter()
        shutil.rmtree(self.output, ignore_errors=True)
        self._step("prepare", self.prepare)
        self._step("train_regressor", self.train_regressor)
        self._step("evaluate_regressor", self.evaluate_regressor)
        self._step("annotate", self._annotate)
        self._step("train_policy", lambda: self._train_policy("policy", self.output / "annotated.jsonl"))
        self._step("evaluate_steering", self._evaluate_steering)
        self._step("bootstrap", self._bootstrap)
        if self.config.compare_labels:
            self._step("compare_labels", self._compare_labels)
        self.seconds["total"] = round(time.perf_counter() - started, 1)
        return self._report()

    def _step(self, name: str, work: Callable[[], None]) -> None:
        sys.stdout.write(f"== {name.replace('_', ' ')}\n")
        sys.stdout.flush()
        started = time.perf_counter()
        work()
        self.seconds[name] = round(time.perf_counter() - started, 1)

    # ---------------------------------------------------------------- the steps

    def prepare(self) -> None:
        """Write the world's files and train a tokenizer on them."""
        recipe = self.recipe
        sizes = synthetic.SyntheticSizes(
            train=recipe.train_rows, unlabelled=recipe.unlabelled_rows, test=recipe.test_rows,
            prompts=recipe.bootstrap_prompts, prompts_test=max(recipe.change_prompts, recipe.steer_prompts),
        )  # fmt: skip
        self.data.mkdir(parents=True)
        config = PrepareConfig(source="synthetic", output=str(self.data), seed=self.config.seed)
        synthetic.write(config, self.schema, sizes)
        texts = corpus(read_conversations(self.data / "train.jsonl"), PromptTemplate())
        train_tokenizer(texts, recipe.vocab_size, PromptTemplate(), self.schema, self.data / "tokenizer")

    def train_regressor(self) -> None:
        """Step 1 on the human labels."""
        config = TrainRegressorConfig(
            output=str(self.output / "regressor"),
            data=DataConfig(
                train=str(self.data / "train.jsonl"), val=str(self.data / "val.jsonl"), max_length=MAX_LENGTH
            ),
            attributes=AttributesConfig(preset="synthetic"),
            model=RegressorModelConfig(**self._random_weights(), head_init="mean"),
            trainer=self._trainer(self.recipe.regressor_steps),
            optimizer=self._optimizer(self.recipe.regressor_lr),
            logging=LoggingConfig(tensorboard=True),
            seed=self.config.seed,
        )
        train_regressor.main(config)

    def _random_weights(self) -> dict[str, Any]:
        architecture = Architecture(
            num_layers=2, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True, init_std=0.04,
        )  # fmt: skip
        return {"architecture": architecture, "tokenizer": str(self.data / "tokenizer")}

    def _trainer(self, steps: int) -> TrainerConfig:
        size = self.recipe.batch_size
        return TrainerConfig(
            max_steps=steps, global_batch_size=size, micro_batch_size=size, val_every=max(1, steps // 3),
            precision=PRECISION,
        )  # fmt: skip

    def _optimizer(self, rate: float) -> OptimizerConfig:
        return OptimizerConfig(lr=rate, min_lr=rate * 0.05, schedule="cosine", warmup_steps=30, weight_decay=0.05)

    def _run_annotate(self, source: Path, output: Path) -> None:
        config = AnnotateConfig(
            checkpoint=str(self.output / "regressor" / "model"), input=str(source), output=str(output),
            trainer=ComputeConfig(precision=PRECISION),
        )  # fmt: skip
        annotate.main(config)

    def _annotate(self) -> None:
        self._run_annotate(self.data / "unlabelled.jsonl", self.output / "annotated.jsonl")

    def evaluate_regressor(self) -> None:
        """Label held-out answers and compare with the oracle: `figures`."""
        path = self.data / "test-annotated.jsonl"
        self._run_annotate(self.data / "test.jsonl", path)
        rows = list(read_conversations(path))
        answers = [row.turns[-1] for row in rows]
        predicted = np.array([self.schema.vector(turn.label_predicted) for turn in answers])
        human = np.array([self.schema.vector(turn.label_human) for turn in answers])
        target = np.array([self.schema.vector(row.extra["oracle"]) for row in rows])
        self.figures["regressor"] = attribute_metrics(predicted, target, self.schema)
        for name, values in attribute_metrics(human, target, self.schema).items():
            self.figures["regressor"][name]["human"] = values
        self.figures["arrays"] = {"regressor": {"predicted": predicted, "target": target, "human": human}}

    def _train_policy(self, name: str, data: Path, label_dropout: float | None = None) -> None:
        label_dropout = self.recipe.label_dropout if label_dropout is None else label_dropout
        config = TrainSftConfig(
            output=str(self.output / name),
            data=PolicyDataConfig(
                train=str(data),
                max_length=MAX_LENGTH,
                label_dropout=label_dropout,
                attribute_dropout=min(self.recipe.attribute_dropout, 1 - label_dropout),
            ),
            attributes=AttributesConfig(preset="synthetic"),
            model=ModelConfig(**self._random_weights()),
            trainer=self._trainer(self.recipe.policy_steps),
            optimizer=self._optimizer(self.recipe.policy_lr),
            logging=LoggingConfig(tensorboard=True),
            seed=self.config.seed,
        )
        train_sft.train(config)

    def _sweep(self, model: AttributeConditionedGPT, ways: Sequence[str]) -> Steering:
        """Ask for every level of every attribute, measure the answers by the oracle."""
        prompts = self._prompts(self.recipe.steer_prompts)
        swept = sweep(model, prompts, ways, self._sampling(model.card.template.stops), 250)
        answers = [row for one in swept.values() for row in answered(prompts, one.requests, one.texts)]
        columns = measure(answers, ["oracle"], {}, self.schema, model, ComputeConfig(), ParallelConfig())
        return figures(prompts, swept, columns, self.schema, self.config.seed, quality="quality")

    def _prompts(self, count: int) -> list[Conversation]:
        return [
            row for row, _ in zip(read_conversations(self.data / "prompts_test.jsonl"), range(count), strict=False)
        ]

    def _sampling(self, stops: tuple[str, ...]) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=160, temperature=self.recipe.temperature, top_k=50, stop=stops, seed=self.config.seed
        )

    def _open(self, policy: str) -> contextlib.closing[AttributeConditionedGPT]:
        return contextlib.closing(
            AttributeConditionedGPT.from_pretrained(self.output / policy / "model", precision=PRECISION)
        )

    def _evaluate_steering(self) -> None:
        """Label information; every way of asking; and answers to no request and at the best and longest setting."""
        recipe, seed = self.recipe, self.config.seed
        rows = list(read_conversations(self.data / "test-annotated.jsonl"))
        with self._open("policy") as model:
            self.figures["listening"] = heard = listening(model, rows, seed)
            found = self._sweep(model, list(WAYS))
            prompts = self._prompts(recipe.change_prompts)
            best = self.schema.complete(dict.fromkeys([*TARGET, "verbosity"], 4))
            for asked, values in ((NOTHING, {}), ("best and longest", best)):
                requests = [Request(attribute=None, level=None, prompt=i, values=values) for i in range(len(prompts))]
                texts = answer(model, prompts, requests, self._sampling(model.card.template.stops), 250)
                found["requests"].append({"asked": asked, **describe_answers(texts)})
        self.figures |= found
        self.figures["verdict"] = verdict(heard and heard["permuted"], found["steerability"])

    def _bootstrap(self) -> None:
        recipe = self.recipe
        config = BootstrapConfig(
            policy=str(self.output / "policy" / "model"),
            regressor=str(self.output / "regressor" / "model"),
            output=str(self.output / "bootstrap"),
            target=TARGET,
            data=BootstrapDataConfig(
                train=str(self.output / "annotated.jsonl"), prompts=str(self.data / "prompts.jsonl"),
                change_prompts=str(self.data / "prompts_test.jsonl"), max_length=MAX_LENGTH,
                attribute_dropout=recipe.attribute_dropout, label_dropout=recipe.label_dropout,
            ),
            keep_fraction=recipe.bootstrap_keep,
            replay=recipe.bootstrap_replay,
            control=True,
            sampling=SamplingConfig(
                responses=recipe.bootstrap_responses, temperature=recipe.temperature, top_k=50, max_new_tokens=160,
                batch_size=250,
            ),
            trainer=self._trainer(recipe.bootstrap_steps),
            optimizer=self._optimizer(recipe.bootstrap_lr),
            logging=LoggingConfig(tensorboard=False),
            seed=self.config.seed,
        )  # fmt: skip
        self.figures["bootstrap"] = bootstrap(config, measure=self._measure)

    def _measure(self, path: Path) -> list[Conversation]:
        """Answers with the oracle's values in place of a regressor's."""
        rows = list(read_conversations(path))
        for row in rows:
            row.turns[-1].label_predicted = oracle(dataclasses.replace(row, turns=row.turns[:-1]), row.turns[-1].text)
        return rows

    # ---------------------------------------------------------------- the paper's comparison

    def _compare_labels(self) -> None:
        """Policies on the same answers with no labels, human labels, and predicted labels of other rows."""
        sources = {"predicted": self.figures["steerability"]}
        for name, (path, label_dropout) in self._arms().items():
            self._train_policy(f"arms/{name}", path, label_dropout)
            with self._open(f"arms/{name}") as model:
                sources[name] = self._sweep(model, ["default"])["steerability"]
        self.figures["label_source"] = sources

    def _arms(self) -> dict[str, tuple[Path, float | None]]:
        """Data and label dropout of each arm."""
        rows = list(read_conversations(self.output / "annotated.jsonl"))
        shuffled = np.random.default_rng(self.config.seed).permutation(len(rows))
        predicted = [row.turns[-1].label for row in rows]
        folder = self.output / "arms"
        folder.mkdir(parents=True)
        for row in rows:
            row.turns[-1].label = row.turns[-1].label_human
        write_conversations(folder / "human.jsonl", rows)
        for row, other in zip(rows, shuffled, strict=True):
            row.turns[-1].label = predicted[other]
        write_conversations(folder / "permuted.jsonl", rows)
        return {
            "none": (self.output / "annotated.jsonl", 1.0),
            "human": (folder / "human.jsonl", None),
            "permuted": (folder / "permuted.jsonl", None),
        }

    # ---------------------------------------------------------------- the report

    def _report(self) -> Results:
        runs = {
            "regressor": "regressor", "policy": "policy", "step 4": "bootstrap/round-1/policy",
            "control of step 4": "bootstrap/control",
        }  # fmt: skip
        self.figures["arrays"]["trainings"] = {name: losses(self.output / run) for name, run in runs.items()}
        data: Results = {
            "title": "SteerLM quickstart",
            "summary": f"The policy {self.figures['verdict']['words']}.",
            "attributes": self.schema.to_dict(),
            **self.figures,
            "seconds": self.seconds,
            "settings": plain(self.config),
            "seed": self.config.seed,
            "versions": versions(),
        }
        data["bars"] = check_bars(data)
        if parallel.is_rank_zero():
            write_run_json(self.output, "quickstart", self.config, [], self.schema)
        return write_report(self.output, data, after_quickstart(self.config))

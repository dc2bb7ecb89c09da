"""The settings of `steerlm evaluate`, and of the measurement of steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_steerlm.config.compute import ComputeConfig, Inference, ParallelConfig
from nemo_steerlm.config.data import OVERLONG
from nemo_steerlm.config.fields import MOST_SEED, Settings, option
from nemo_steerlm.errors import ConfigError, suggest

WAYS = ("default", "alone", "all")


@dataclass(kw_only=True)
class SteeringConfig(Settings):
    """Settings that measure whether a policy listens to its labels and does what it is asked."""

    scorers: list[str] | None = option(
        None, "what measures answers: model folder of a regressor, text, oracle, MODULE:FUNCTION, http://...", hub=True
    )
    measures: dict[str, str] = option(dict, "score that measures an attribute, if not of its name: {verbosity:tokens}")
    rows: int = option(200, "labelled rows whose labels are permuted; 0 = none", least=0)
    prompts: int = option(50, "prompts that are answered at every level; 0 = none", least=0)
    max_new_tokens: int = option(256, "longest answer, tokens", least=1)
    batch_size: int = option(64, "answers generated at once", least=1)


@dataclass(kw_only=True)
class PreferenceConfig(Settings):
    """Settings of `steerlm evaluate task=preference`."""

    layout: str = option(
        "auto", "form of the input; auto = detected from its keys",
        choices=("auto", "hh", "conversations", "rewardbench", "rewardbench2", "rm_bench"),
    )  # fmt: skip
    weights: dict[str, float] = option(dict, "weights of the attributes: preference.weights={helpfulness: 0.65}")
    preset: str | None = option(
        None, "published weights, on HelpSteer2's attributes", choices=("nemotron_4_340b", "llama3_70b")
    )
    fit: str | None = option(None, "held-out pairs to fit the weights on; never those of the input")
    floor_train: str | None = option(None, "held-out pairs for the TF-IDF baseline; null = cross-fit on the input")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that only one setting gives the weights."""
        super().validate(prefix)
        given = [name for name in ("weights", "preset", "fit") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"preference.{given[0]} and preference.{given[1]} both say how attributes add up; give one"
            )


@dataclass(kw_only=True)
class SteerabilityConfig(SteeringConfig):
    """Settings of `steerlm evaluate task=steerability`."""

    ways: list[str] = option(
        lambda: list(WAYS),
        f"one attribute with the others at their default, one alone, all at random levels: of {', '.join(WAYS)}",
    )
    quality: str | None = option(None, "score for the cost of a request; null = quality or helpfulness, if measured")
    temperature: float = option(0.0, "0 = always the likeliest token", least=0.0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0 = all", least=0)

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that there is a way to ask, and no unknown one."""
        super().validate(prefix)
        for way in self.ways:
            if way not in WAYS:
                raise ConfigError(
                    f"steerability.ways: no way is called {way}{suggest(way, WAYS)} There are {', '.join(WAYS)}"
                )
        if self.prompts and not self.ways:
            raise ConfigError("steerability.ways is empty; name one of " + ", ".join(WAYS) + ", or give prompts=0")


@dataclass(kw_only=True)
class EvaluateConfig(Inference):
    """Settings of `steerlm evaluate`."""

    task: str = option(
        MISSING, "what to measure", choices=("regressor", "preference", "label_noise", "steerability"),
        example="regressor",
    )  # fmt: skip
    checkpoint: str | None = option(
        None, "model folder or name on the hub: of a regressor, of a policy for steerability; not needed by "
        "label_noise if the rows hold predictions", hub=True,
    )  # fmt: skip
    input: Any = option(
        MISSING, "conversations with labels, a file or [ONE,TWO]; preferences", example="data/val.jsonl"
    )
    output: str = option(MISSING, "folder for report.json, report.html and pictures", example="outputs/evaluation")
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=OVERLONG)
    max_length: int | None = option(None, "longest sample, tokens; null = the model's", least=2)
    batch_tokens: int | None = option(None, "tokens a forward pass, as annotate's", least=1)
    seed: int = option(0, "seed of the bootstrap intervals", least=0, most=MOST_SEED)
    resamples: int = option(1000, "resamples for the intervals; 0 = none; task=preference: always 1000", least=0)
    calibrate: str | None = option(
        None, "fit a calibration on the input and store it with the model; temperature is for a distribution",
        choices=("isotonic", "linear", "temperature"),
    )  # fmt: skip
    preference: PreferenceConfig = option(PreferenceConfig, "of task=preference")
    steerability: SteerabilityConfig = option(SteerabilityConfig, "of task=steerability")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")

    def validate(self, prefix: str = "") -> None:
        """As `Inference.validate`, and that the task has the settings it needs and no others."""
        super().validate(prefix)
        if not self.inputs() or not all(isinstance(one, str) for one in self.inputs()):
            raise ConfigError(f"input={self.input!r:.80}: expected a file, or a list: input=[a.jsonl,b.jsonl]")
        if self.checkpoint is None and self.task != "label_noise":
            kind = "policy" if self.task == "steerability" else "regressor"
            raise ConfigError(f"task={self.task} needs checkpoint=, the model folder of a {kind}")
        own = (
            ("calibrate", "regressor", None), ("preference", "preference", PreferenceConfig()),
            ("steerability", "steerability", SteerabilityConfig()),
        )  # fmt: skip
        for key, task, unused in own:
            if self.task != task and getattr(self, key) != unused:
                raise ConfigError(f"{key} is for task={task}; task={self.task} has no use for it: leave it out")
        if self.task == "preference" and len(self.inputs()) > 1:
            raise ConfigError("task=preference reads one file; put several into a folder and give that as input=")

    def inputs(self) -> list[str]:
        """The files of `input`."""
        return list(self.input) if isinstance(self.input, (list, tuple)) else [self.input]

"""The commands at the foot of a page: the one that made it and the next one, with the README's names for files."""

from __future__ import annotations

from pathlib import Path

from nemo_steerlm.config import (
    AnnotateConfig,
    AttributesConfig,
    BootstrapConfig,
    BootstrapDataConfig,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    PolicyDataConfig,
    PrepareConfig,
    QuickstartConfig,
    RegressorModelConfig,
    SteerabilityConfig,
    TrainerConfig,
    TrainRegressorConfig,
    TrainSftConfig,
)
from nemo_steerlm.config.command import command
from nemo_steerlm.report.page import Commands


def _trainer(steps: int) -> TrainerConfig:
    return TrainerConfig(max_steps=steps, global_batch_size=32, micro_batch_size=4)


def after_prepare(config: PrepareConfig, preset: str, labelled: bool) -> Commands:
    """Train a regressor on the labels, of `preset` where no schema is given; without labels, annotate the data."""
    folder = Path(str(config.output))
    train, val = (str(folder / f"{side}.jsonl") for side in ("train", "val"))
    if not labelled:
        return Commands(made=command("prepare", config), next=_annotate("regressor/model", train))
    known = config.attributes.preset or config.attributes.schema
    attributes = config.attributes if known else AttributesConfig(preset=preset)
    then = TrainRegressorConfig(
        attributes=attributes, data=DataConfig(train=train, val=val), model=RegressorModelConfig(init="base"),
        trainer=_trainer(800), output="regressor",
    )  # fmt: skip
    return Commands(made=command("prepare", config), next=command("train-regressor", then))


def after_regressor(config: EvaluateConfig) -> Commands:
    """Label data with the regressor that was measured."""
    return Commands(made=command("evaluate", config), next=_annotate(str(config.checkpoint), "data/train.jsonl"))


def _annotate(regressor: str, data: str) -> str:
    return command("annotate", AnnotateConfig(checkpoint=regressor, input=data, output="labelled.jsonl"))


def after_label_noise(config: EvaluateConfig) -> Commands:
    """Train a policy on the labels that were compared."""
    labelled = config.inputs()[0] if config.checkpoint is None else "labelled.jsonl"
    return Commands(made=command("evaluate", config), next=_train_policy(config.checkpoint, labelled))


def after_annotate(config: AnnotateConfig) -> Commands:
    """Train a policy on the new labels."""
    return Commands(made=command("annotate", config), next=_train_policy(config.checkpoint, config.output))


def _train_policy(regressor: str | None, labelled: str) -> str:
    then = TrainSftConfig(
        attributes=AttributesConfig(preset=str(Path(regressor or "regressor/model") / "attributes.yaml")),
        data=PolicyDataConfig(train=labelled), model=ModelConfig(init="base"), trainer=_trainer(800),
        output="policy",
    )  # fmt: skip
    return command("train-sft", then)


def after_steerability(config: EvaluateConfig, target: str) -> Commands:
    """Bootstrap the policy."""
    regressors = [name for name in config.steerability.scorers or () if Path(name).exists()]
    then = BootstrapConfig(
        policy=str(config.checkpoint), regressor=(regressors or ["regressor/model"])[0], target=[target],
        data=BootstrapDataConfig(train="labelled.jsonl", change_prompts=config.inputs()[0]),
        trainer=_trainer(60), output="bootstrap",
    )  # fmt: skip
    return Commands(made=command("evaluate", config), next=command("bootstrap", then))


def after_bootstrap(config: BootstrapConfig) -> Commands:
    """Measure steerability of the new policy."""
    output = Path(config.output)
    then = EvaluateConfig(
        task="steerability", checkpoint=str(output / "model"), input=config.data.change_prompts or config.data.val,
        output=str(output / "steering"), steerability=SteerabilityConfig(scorers=[config.regressor]),
    )  # fmt: skip
    return Commands(made=command("bootstrap", config), next=command("evaluate", then))


def after_quickstart(config: QuickstartConfig) -> Commands:
    """Generate an answer with the policy."""
    policy = str(Path(config.output) / "bootstrap" / "model")
    then = GenerateConfig(checkpoint=policy, prompt="How do I bake bread?", attributes={"humor": 4.0})
    return Commands(made=command("quickstart", config), next=command("generate", then))

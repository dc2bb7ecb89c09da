"""The settings of the verbs that train."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from omegaconf import MISSING

from nemo_steerlm.config.compute import ParallelConfig, check_inference
from nemo_steerlm.config.data import DataConfig, PolicyDataConfig
from nemo_steerlm.config.evaluate import SteeringConfig
from nemo_steerlm.config.fields import MOST_SEED, option
from nemo_steerlm.config.model import HEADS, ModelConfig, RegressorModelConfig
from nemo_steerlm.config.prompt import AttributesConfig, TemplateConfig
from nemo_steerlm.config.training import (
    FULL_RATE,
    LORA_RATE,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainerConfig,
    Training,
)
from nemo_steerlm.config.verbs import SamplingConfig
from nemo_steerlm.errors import ConfigError


@dataclass(kw_only=True)
class TrainConfig(Training):
    """Settings of both train-regressor and train-sft."""

    output: str = option(MISSING, "run folder", example="outputs/run")
    attributes: AttributesConfig = option(AttributesConfig, "attribute schema")
    template: TemplateConfig = option(TemplateConfig, "strings of the prompt")
    trainer: TrainerConfig = option(TrainerConfig, "training loop")
    parallel: ParallelConfig = option(ParallelConfig, "layout")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimizer")
    logging: LoggingConfig = option(LoggingConfig, "loggers")
    seed: int = option(1234, "seed of weights, data order and dropout", least=0, most=MOST_SEED)
    resume: bool = option(True, "go on from the newest complete checkpoint in the run folder")
    data: DataConfig = option(DataConfig, "training data")
    model: ModelConfig = option(ModelConfig, "model")

    def validate(self, prefix: str = "") -> None:
        """As `Training.validate`, and that there are attributes, a learning rate, trained weights on each stage."""
        super().validate(prefix)
        self.attributes.require()
        if self.trainer.precision == "fp8" and find_spec("transformer_engine") is None:
            raise ConfigError(
                "trainer.precision=fp8 needs Transformer Engine, which is not installed; use trainer.precision=bf16"
            )
        stages = self.parallel.pipeline
        if self.model.freeze == "trunk" and stages > 1:
            raise ConfigError(
                f"model.freeze=trunk leaves nothing to train on the first of parallel.pipeline={stages} stages; "
                "use parallel.tensor instead"
            )
        if self.optimizer.lr is None:
            default_rate(self)


def default_rate(config: TrainConfig) -> tuple[float, str]:
    """The default peak learning rate of a training, and the kind of training it is for.

    Raises:
        ConfigError: random weights or a head alone, whose learning rate depends on their size.
    """
    if config.model.init is None or config.model.freeze == "trunk":
        what = "random weights" if config.model.init is None else "model.freeze=trunk"
        raise ConfigError(f"optimizer.lr is missing: no default suits {what}; give one, e.g. optimizer.lr=1e-3")
    return (LORA_RATE, "LoRA") if config.model.lora.rank else (FULL_RATE, "full fine-tuning")


@dataclass(kw_only=True)
class TrainRegressorConfig(TrainConfig):
    """Settings of `steerlm train-regressor`."""

    data: DataConfig = option(DataConfig, "training data")
    model: RegressorModelConfig = option(RegressorModelConfig, "model")
    head: str | None = option(
        None, "a value as a number, a distribution over levels, or text; null = as model.init, else regression",
        choices=HEADS,
    )  # fmt: skip
    loss: LossConfig = option(LossConfig, "loss")

    def validate(self, prefix: str = "") -> None:
        """As `TrainConfig.validate`, and that the loss names attributes of the schema."""
        super().validate(prefix)
        if self.head != "generative":  # which has none of these settings: `train.losses.check_loss`
            self.loss.check_names(self.attributes.require())


@dataclass(kw_only=True)
class SteeringCheckConfig(SteeringConfig):
    """The short measurement at the end of a training."""

    check: bool = option(True, "end with a short measurement of steering, in steering.json")
    rows: int = option(100, "validation rows whose labels are permuted, at every validation too; 0 = none", least=0)
    prompts: int = option(8, "prompts that are answered at three levels; 0 = none", least=0)
    max_new_tokens: int = option(64, "longest answer, tokens", least=1)


@dataclass(kw_only=True)
class TrainSftConfig(TrainConfig):
    """Settings of `steerlm train-sft`."""

    data: PolicyDataConfig = option(PolicyDataConfig, "training data")
    model: ModelConfig = option(ModelConfig, "model")
    steering: SteeringCheckConfig = option(SteeringCheckConfig, "whether the policy listens and obeys")


@dataclass(kw_only=True)
class BootstrapDataConfig(PolicyDataConfig):
    """Data of `steerlm bootstrap`; `train` is the annotated data the policy was trained on."""

    train: str = option(MISSING, "conversations (.jsonl or .jsonl.gz)", example="data/train.jsonl")
    val: str | None = option(None, "conversations to validate on; null = no validation")
    prompts: str | None = option(None, "conversations to answer; null = those of data.train")
    change_prompts: str | None = option(None, "held-out conversations the change is measured on; null = data.val")


@dataclass(kw_only=True)
class BootstrapConfig(Training):
    """Settings of `steerlm bootstrap` (step 4)."""

    policy: str = option(
        MISSING, "model folder of the policy or its name on the hub", example="outputs/policy/model", hub=True
    )
    regressor: str = option(
        MISSING, "model folder of the regressor or its name on the hub", example="outputs/regressor/model", hub=True
    )
    output: str = option(MISSING, "run folder", example="outputs/bootstrap")
    target: list[str] = option(MISSING, "attributes held at their maximum", example="[quality]")
    data: BootstrapDataConfig = option(BootstrapDataConfig, "data")
    rounds: int = option(1, "rounds of sampling and training", least=1)
    keep_fraction: float = option(
        0.5, "share of the prompts whose best response is kept, best predicted targets first", least=0.0, most=1.0
    )
    replay: float = option(1.0, "original rows mixed in for each kept response", least=0.0)
    control: bool = option(False, "also train as many steps on the original data alone, and report that change")
    batch_tokens: int | None = option(None, "tokens a forward pass of the regressor, as annotate's", least=1)
    sampling: SamplingConfig = option(SamplingConfig, "how responses are drawn")
    trainer: TrainerConfig = option(TrainerConfig, "training loop")
    parallel: ParallelConfig = option(ParallelConfig, "layout")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimizer")
    logging: LoggingConfig = option(LoggingConfig, "loggers")
    steering: SteeringCheckConfig = option(SteeringCheckConfig, "whether the new policy listens and obeys")
    seed: int = option(1234, "seed of everything drawn", least=0, most=MOST_SEED)
    resume: bool = option(True, "skip steps that the run folder already holds")

    def validate(self, prefix: str = "") -> None:
        """As `Training.validate`, and that the change can be measured."""
        super().validate(prefix)
        check_inference(self.trainer.precision)
        if self.data.change_prompts is None and self.data.val is None:
            raise ConfigError(
                "data.change_prompts is missing: held-out prompts to measure the change on (or data.val)"
            )

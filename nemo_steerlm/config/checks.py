"""Checks of settings against each other, for those who build them in Python too; `compose.check` has the rest."""

from __future__ import annotations

from nemo_steerlm.config.model import LORA_TARGETS
from nemo_steerlm.config.training import FULL_RATE, LORA_RATE
from nemo_steerlm.config.verbs import TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.errors import ConfigError, suggest


def check_inference(precision: str | None) -> None:
    """Refuse a number format that only trainings compute in (ConfigError)."""
    if precision == "fp8":
        raise ConfigError(
            "trainer.precision=fp8 is for train-regressor and train-sft; reading and generating do not compute in fp8 "
            "yet: use trainer.precision=bf16"
        )


def check_trainable(config: TrainRegressorConfig | TrainSftConfig) -> None:
    """Refuse a choice of trained weights that makes no sense.

    Raises:
        ConfigError: an unknown LoRA target, nothing to adapt, a backbone that cannot be frozen, or no learning
            rate where there is no default.
    """
    model, lora = config.model, config.model.lora
    for name in lora.targets:
        if name not in LORA_TARGETS:
            raise ConfigError(
                f"model.lora.targets: no linear is called {name}{suggest(name, LORA_TARGETS) or '.'} "
                f"There are {', '.join(LORA_TARGETS)}"
            )
    frozen = f"model.lora.rank={lora.rank}" if lora.rank else f"model.freeze={model.freeze}"
    if lora.rank and not lora.targets:
        raise ConfigError(f"{frozen} with an empty model.lora.targets trains nothing; name at least one linear")
    if lora.rank and model.freeze != "none":
        raise ConfigError(f"{frozen} trains adapters in what model.freeze={model.freeze} freezes; give one")
    if model.freeze == "trunk" and config.parallel.pipeline > 1:
        raise ConfigError(
            f"model.freeze=trunk leaves nothing to train on the first of parallel.pipeline={config.parallel.pipeline} "
            "stages; use parallel.tensor instead"
        )
    if model.init is None and (lora.rank or model.freeze != "none"):
        raise ConfigError(f"{frozen} keeps the weights it starts from: give them with model.init=FOLDER")
    if config.optimizer.lr is None:
        default_rate(config)


def default_rate(config: TrainRegressorConfig | TrainSftConfig) -> tuple[float, str]:
    """The peak learning rate of a training that is given none, and for what it is.

    Raises:
        ConfigError: random weights or a head alone, whose rate depends on their size.
    """
    if config.model.init is None or config.model.freeze == "trunk":
        what = "random weights" if config.model.init is None else "model.freeze=trunk"
        raise ConfigError(f"optimizer.lr is missing: no default suits {what}; give one, e.g. optimizer.lr=1e-3")
    return (LORA_RATE, "LoRA") if config.model.lora.rank else (FULL_RATE, "full fine-tuning")

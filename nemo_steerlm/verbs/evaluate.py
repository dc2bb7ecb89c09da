"""`steerlm evaluate`: run a model over data and hand what it said to `evaluate/`, which measures and draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from nemo_steerlm.config import EvaluateConfig, PreferenceConfig, SteerabilityConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.verbs import evaluate_steerability as steerability
from nemo_steerlm.verbs.evaluate_label_noise import label_noise
from nemo_steerlm.verbs.evaluate_preference import preference
from nemo_steerlm.verbs.evaluate_regressor import regressor

#: Tasks of a regressor to what does them: (model, config) -> the lines to print. Every rank runs it; rank 0 writes.
TASKS: dict[str, Callable[[Any, EvaluateConfig], str]] = {
    "regressor": regressor, "preference": preference, "label_noise": label_noise,
}  # fmt: skip
#: Tasks that can do without a model; theirs is None then.
_WITHOUT_MODEL = ("label_noise",)


def main(config: EvaluateConfig) -> str:
    """`steerlm evaluate`: write the report of `config.task` into `config.output`, return its table.

    Raises:
        ConfigError: the task needs a model, or has no use for a setting that is given.
    """
    if config.checkpoint is None and config.task not in _WITHOUT_MODEL:
        kind = "policy" if config.task == "steerability" else "regressor"
        raise ConfigError(f"task={config.task} needs checkpoint=, the model folder of a {kind}")
    own = (
        ("calibrate", "regressor", None), ("preference", "preference", PreferenceConfig()),
        ("steerability", "steerability", SteerabilityConfig()),
    )  # fmt: skip
    for key, task, unused in own:
        if config.task != task and getattr(config, key) != unused:
            raise ConfigError(f"{key} is for task={task}; task={config.task} has no use for it: leave it out")
    if config.task == "steerability":
        return steerability.evaluate(config)
    parallel.start(config)
    if config.checkpoint is None:
        return TASKS[config.task](None, config)
    model = AttributeRegressor.from_pretrained(
        config.checkpoint, parallel=config.parallel, precision=config.trainer.precision
    )
    with contextlib.closing(model):
        return TASKS[config.task](model, config)

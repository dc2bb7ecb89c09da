"""`steerlm evaluate`: run a model over data; `evaluate/` measures its output and `report/` draws the pages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from nemo_steerlm.config import EvaluateConfig, choices
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.verbs import evaluate_steerability as steerability
from nemo_steerlm.verbs.evaluate_label_noise import label_noise
from nemo_steerlm.verbs.evaluate_preference import preference
from nemo_steerlm.verbs.evaluate_regressor import regressor

#: The function of each task of a regressor: (model, config) -> the lines to print. Every rank runs it; rank 0 writes.
#: label_noise works without a model too, which is None then.
TASKS: dict[str, Callable[[Any, EvaluateConfig], str]] = {
    "regressor": regressor, "preference": preference, "label_noise": label_noise,
}  # fmt: skip
assert {*TASKS, "steerability"} == set(choices(EvaluateConfig, "task"))


def main(config: EvaluateConfig) -> str:
    """`steerlm evaluate`: write the report of `config.task` into `config.output`, return its table."""
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

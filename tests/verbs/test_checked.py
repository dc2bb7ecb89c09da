"""Every verb checks the dataclass that Python code calls it with, before it looks at a file or a model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from nemo_steerlm import config as c
from nemo_steerlm.cli import VERBS
from nemo_steerlm.errors import ConfigError

_TRAINER: dict[str, Any] = dict(max_steps=1, global_batch_size=8, micro_batch_size=4)
_TRAINING: dict[str, Any] = dict(
    output="o", attributes=c.AttributesConfig(preset="helpsteer"), optimizer=c.OptimizerConfig(lr=1e-3)
)
WRONG: dict[str, tuple[c.Settings, str]] = {
    "quickstart": (c.QuickstartConfig(recipe=c.QuickstartRecipe(batch_size=0)), "recipe.batch_size=0"),
    "prepare": (c.PrepareConfig(source="oast", output="o"), "did you mean 'oasst'"),
    "import": (c.ImportConfig(input="i", output="o", parallel=c.ParallelConfig(tensor=0)), "parallel.tensor=0"),
    "train-regressor": (
        c.TrainRegressorConfig(
            **_TRAINING, trainer=c.TrainerConfig(**_TRAINER), data=c.DataConfig(train="t"),
            model=c.RegressorModelConfig(),
        ),
        "model.init is missing",
    ),
    "annotate": (
        c.AnnotateConfig(checkpoint="m", input="i", output="o", trainer=c.ComputeConfig(precision="fp8")),
        "trainer.precision=fp8 is for train-regressor and train-sft",
    ),
    "train-sft": (
        c.TrainSftConfig(
            **_TRAINING, trainer=c.TrainerConfig(**_TRAINER), data=c.PolicyDataConfig(train="t"),
            model=c.ModelConfig(init="m"), parallel=c.ParallelConfig(tensor=2),
        ),
        "is 1, expected a multiple of parallel.tensor=2",
    ),
    "sample": (
        c.SampleConfig(checkpoint="m", prompts="p", annotated="a", target=["humor"], output="o", top_k=-1),
        "top_k=-1: expected at least 0",
    ),
    "bootstrap": (
        c.BootstrapConfig(
            policy="p", regressor="r", output="o", target=["humor"], trainer=c.TrainerConfig(**_TRAINER),
            data=c.BootstrapDataConfig(train="t"),
        ),
        "data.change_prompts is missing",
    ),
    "generate": (c.GenerateConfig(checkpoint="m", prompt="Hi", temperature=-1.0), "temperature=-1.0"),
    "evaluate": (c.EvaluateConfig(task="regressor", input="i", output="o"), "task=regressor needs checkpoint="),
    "experiments": (c.ExperimentsConfig(verb="train-sftt"), "did you mean 'train-sft'"),
    "plan": (c.PlanConfig(gpu="h100"), "did you mean 'h100_80g'"),
    "submit": (c.SubmitConfig(verb="train-sftt"), "did you mean 'train-sft'"),
    "export": (c.ExportConfig(checkpoint="m", output="o", dtype="bfloat"), "did you mean 'bfloat16'"),
    "push-to-hub": (c.PushToHubConfig(input="i", repository="mine"), "expected OWNER/NAME, as on the hub"),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_refuses_settings_that_make_no_sense(verb: str) -> None:
    settings, message = WRONG[verb]
    module, _, function = VERBS[verb][0].partition(":")
    with pytest.raises(ConfigError, match=message):
        getattr(importlib.import_module(f"nemo_steerlm.{module}"), function)(settings)

"""The command line, the Python functions and whoever builds a dataclass are told the same of a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import nemo_steerlm
from nemo_steerlm import config as c
from nemo_steerlm.config import compose
from nemo_steerlm.config.overrides import typed
from nemo_steerlm.errors import ConfigError

GIVEN = {
    "output": "o", "attributes.preset": "helpsteer", "data.train": "t.jsonl", "model.init": "m", "optimizer.lr": 1e-3,
    "trainer.max_steps": 4, "trainer.global_batch_size": 8, "trainer.micro_batch_size": 4,
}  # fmt: skip
# what is given instead, and what is said
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "choice": (
        {"data.overlong": "dropp"},
        "data.overlong=dropp: expected one of truncate_history, drop, error; did you mean 'drop'?",
    ),
    "range": ({"optimizer.beta1": 1.0}, "optimizer.beta1=1.0: expected less than 1"),
    "not a number": ({"optimizer.clip_grad": float("nan")}, "optimizer.clip_grad=nan: expected a finite number"),
    "layout": (
        {"parallel.tensor": 2},
        "trainer.num_nodes=1 x trainer.devices=1 is 1, expected a multiple of parallel.tensor=2 x "
        "parallel.pipeline=1 = 2",
    ),
    "sequence": ({"parallel.sequence": True}, "parallel.sequence=true needs parallel.tensor of at least 2"),
    "batch": (
        {"trainer.micro_batch_size": 3},
        "trainer.global_batch_size=8 is not a multiple of trainer.micro_batch_size=3 x 1 data-parallel rank = 3",
    ),
    "no model": (
        {"model.init": None},
        "model.init is missing; give a model folder or a Hugging Face folder (model.init=outputs/base), or a shape "
        "for random weights (model=llama_tiny)",
    ),
    "no end": (
        {"trainer.max_steps": None},
        "trainer.max_steps is missing; give it or trainer.max_epochs, e.g. trainer.max_steps=800",
    ),
    "no linear": (
        {"model.lora.rank": 4, "model.lora.targets": []},
        "model.lora.rank=4 with an empty model.lora.targets trains nothing; name at least one linear",
    ),
    "no validation": (
        {"trainer.best_metric": "val/loss"}, "trainer.best_metric=val/loss needs validation data: give data.val=FILE"
    ),
    "shares": (
        {"data.attribute_dropout": 0.7, "data.label_dropout": 0.7}, "attribute_dropout + label_dropout is 1.4, above 1"
    ),
}  # fmt: skip


def built(schema: type, values: dict[str, Any]) -> Any:
    """The dataclass with these values, as Python code sets them."""
    settings = schema()
    for key, value in values.items():
        *parts, name = key.split(".")
        part = settings
        for one in parts:
            part = getattr(part, one)
        assert hasattr(part, name)
        setattr(part, name, value)
    return settings


@pytest.mark.parametrize("name", MISTAKES)
def test_every_caller_is_told_the_same(name: str) -> None:
    change, message = MISTAKES[name]
    given = {**GIVEN, **change}
    callers: dict[str, Callable[[], Any]] = {
        "command line": lambda: compose.load(
            "train-sft", c.TrainSftConfig, [f"{k}={typed(v)}" for k, v in given.items()]
        ),
        "function": lambda: nemo_steerlm.train_sft(**given),
        "dataclass": lambda: built(c.TrainSftConfig, given).validate(),
    }
    for caller, call in callers.items():
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == message, caller


def test_what_is_mandatory_is_missed_by_every_caller() -> None:
    given = {key: value for key, value in GIVEN.items() if key != "data.train"}
    message = "data.train is missing; give it on the command line, e.g. data.train=data/train.jsonl"
    for call in (lambda: nemo_steerlm.train_sft(**given), lambda: built(c.TrainSftConfig, given).validate()):
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == message


# what is wrong on its own, whatever verb it belongs to
SECTIONS: list[tuple[c.Settings, str]] = [
    (c.ComputeConfig(precision="fp16"), "precision=fp16: expected one of fp32, bf16, fp8"),
    (c.ParallelConfig(context=2), "parallel.context=2 needs the ring attention of Transformer Engine"),
    (c.ParallelConfig(virtual_pipeline=2), "parallel.virtual_pipeline needs parallel.pipeline of at least 2"),
    (c.Architecture(family="gemma"), "family=gemma: expected one of llama, mistral"),
    (c.Architecture(family="qwen3", rotary_percent=0.5), "rotary_percent=0.5: qwen3 rotates whole heads"),
    (c.LoRAConfig(targets=["linear_qv"]), "no linear is called linear_qv; did you mean 'linear_qkv'"),
    (c.LossConfig(kind="none"), "loss.kind=none leaves nothing to train on"),
    (c.LossConfig(weights={"humor": -1.0}), "weights.humor=-1.0: expected at least 0"),
    (c.AttributesConfig(preset="helpster"), "did you mean 'helpsteer'"),
    (c.TemplateConfig(turn_start="<extra_id_2>"), "overlap"),
    (c.SteerabilityConfig(ways=["alon"]), "steerability.ways: no way is called alon; did you mean 'alone'"),
    (c.SteerabilityConfig(ways=[]), "steerability.ways is empty"),
    (c.PreferenceConfig(preset="llama3_70b", fit="pairs.jsonl"), "preference.preset and preference.fit both"),
    (c.PrepareConfig(source="oasst"), "output is missing"),
    (c.PrepareConfig(source="oasst", output="o", columns={"prompt": "ask"}), "columns is for source=table"),
    (c.AnnotateConfig(checkpoint="m", input="a.jsonl", output="./a.jsonl"), "this is the input"),
    (c.AnnotateConfig(checkpoint="m", input="i", output="o", shards="8/8"), "shards=8/8: .*0/8 to 7/8"),
    (
        c.GenerateConfig(checkpoint="m", prompt="Hi", trainer=c.ComputeConfig(precision="fp8")),
        "is for train-regressor",
    ),
    (c.EvaluateConfig(task="regressor", input="i", output="o"), "task=regressor needs checkpoint=, .* a regressor"),
    (c.EvaluateConfig(task="label_noise", input=[], output="o"), "expected a file, or a list"),
    (
        c.EvaluateConfig(task="preference", checkpoint="m", input=["a", "b"], output="o"),
        "task=preference reads one file",
    ),
    (
        c.EvaluateConfig(
            task="regressor", checkpoint="m", input="i", output="o", preference=c.PreferenceConfig(fit="f")
        ),
        "preference is for task=preference; task=regressor has no use for it",
    ),
]


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_a_dataclass_knows_what_it_cannot_be(number: int) -> None:
    settings, message = SECTIONS[number]
    with pytest.raises(ConfigError, match=message):
        settings.validate()


def test_an_epoch_of_a_packed_row_has_no_micro_batches_to_check() -> None:
    given = {**GIVEN, "data.packing": True, "trainer.micro_batch_size": 3}
    built(c.TrainSftConfig, given).validate()


def test_a_regressors_loss_is_about_its_attributes() -> None:
    for change, message in (
        ({"loss.weights": {"humour": 2.0}}, "loss.weights.humour: no such attribute; did you mean 'humor'"),
        ({"loss.preference": "scaled"}, "loss.preference=scaled needs loss.preference_attribute=one of quality"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(c.TrainRegressorConfig, {**GIVEN, **change}).validate()

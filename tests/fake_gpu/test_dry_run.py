"""`measure`: the parts of a step's memory beside arithmetic, and every kind of training there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import (
    AnnotateConfig,
    Architecture,
    GenerateConfig,
    SampleConfig,
    TrainConfig,
    TrainRegressorConfig,
    TrainSftConfig,
)
from nemo_steerlm.config.compose import draft
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.fake_gpu.dry_run import Measured, measure, measure_inference
from nemo_steerlm.fake_gpu.room import Room
from tests import tokenizers

VERBS: dict[str, type[TrainConfig]] = {"train-sft": TrainSftConfig, "train-regressor": TrainRegressorConfig}
INFERENCE: dict[str, type[Any]] = {"annotate": AnnotateConfig, "sample": SampleConfig, "generate": GenerateConfig}
SMALL: dict[str, Any] = dict(
    num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, vocab_size=1000
)
MATRICES = 4 * (4 * 256**2 + 3 * 256 * 512)  # of all layers
NORMS, VOCABULARY = (2 * 4 + 1) * 256, 1024 * 256


def config(verb: str, **values: Any) -> TrainConfig:
    """A training of a small model on files that do not exist."""
    words = ["trainer=gpu_node", "attributes=helpsteer", "output=absent", "data.train=absent.jsonl"]
    given = {
        "model.architecture": SMALL,
        "data.max_length": 64,
        "trainer.max_steps": 9,
        "optimizer.lr": 1e-4,
        **values,
    }
    made = OmegaConf.to_object(draft(verb, VERBS[verb], words, values=given))
    assert isinstance(made, TrainConfig)
    return made


def check(found: Measured) -> None:
    """What holds for every step."""
    assert sum(found.parts.values()) == found.peak >= sum(found.resting.values())
    assert found.parts["activations"] > 0 and found.saving >= found.resting["parameters"]
    assert 0 < found.trained <= found.parameters


@pytest.mark.parametrize("tensor", [1, 2])
def test_parts_are_those_of_arithmetic(room: Room, tensor: int) -> None:
    found = measure(room, config("train-sft", parallel={"tensor": tensor, "sequence": tensor > 1}))
    weights = (MATRICES + 2 * VOCABULARY) // tensor + NORMS
    check(found)
    assert found.parameters == found.trained == weights
    expected = {"parameters": 2 * weights, "gradient buffers": 4 * weights, "optimizer": 12 * weights * tensor // 8}
    for part, size in expected.items():
        assert found.resting[part] == pytest.approx(size, rel=0.02), part
    reduced = sum(size for name, size in found.sent.items() if "reduce_scatter" in name)
    assert reduced >= 4 * weights, "gradients in fp32"


def test_stages_hold_their_layers_and_the_first_the_most_micro_batches(room: Room) -> None:
    job = config("train-sft", parallel={"pipeline": 4})
    found = [measure(room, job, stage=stage) for stage in (0, 1, 3)]
    ends = [VOCABULARY, 0, VOCABULARY + 256]
    assert [one.parameters for one in found] == [MATRICES // 4 + 2 * 256 + end for end in ends]
    assert [one.micro_batches for one in found] == [4, 3, 1]


def test_share_of_tokens_that_carry_loss(room: Room) -> None:
    job = config("train-sft", **{"data.max_length": 512})
    most, half = (measure(room, job, loss_share=share).parts["activations"] for share in (1.0, 0.5))
    assert most - half > 256 * 1024 * (2 + 4)  # logits of half of the positions, in bf16 and fp32


def test_averages_and_adapters(room: Room) -> None:
    whole = measure(room, config("train-sft", **{"optimizer.ema_decay": 0.9}))
    assert whole.parts["average"] == pytest.approx(4 * whole.parameters, rel=0.01)
    adapters = measure(room, config("train-sft", **{"model.lora.rank": 4}))
    check(adapters)
    assert adapters.trained < 0.1 * adapters.parameters
    assert adapters.parts["gradient buffers"] == pytest.approx(4 * adapters.trained, rel=0.02)


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        ("train-sft", {"data.packing": True, "parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
        ("train-sft", {"model.freeze": "trunk"}),
        ("train-sft", {"trainer.recompute": "full", "optimizer.overlap": True}),
        ("train-regressor", {"head": "generative", "data.packing": True}),
        ("train-regressor", {"head": "distribution", "model.pooling": "mean", "model.lora.rank": 4}),
        ("train-regressor", {"loss": {"preference": "scaled", "preference_attribute": "helpfulness"}}),
        (
            "train-regressor",
            {"loss": {"kind": "none", "preference": "scaled", "preference_attribute": "helpfulness"},
             "data.packing": True, "parallel": {"pipeline": 2}},
        ),
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_training(room: Room, verb: str, values: dict[str, Any]) -> None:
    job = config(verb, **values)
    check(measure(room, job, stage=job.parallel.pipeline - 1))


def test_the_shape_of_a_folder(room: Room, tmp_path: Path) -> None:
    folder = tokenizers.llama_like(tmp_path)
    shape = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=96, vocab_size=640,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    found = measure(room, config("train-sft", **{"model.architecture": None, "model.init": str(folder)}))
    assert found.parameters == 2 * (4 * 64**2 + 3 * 64 * 96) + 2 * 640 * 64 + 5 * 64


def inference(verb: str, **values: Any) -> Any:
    """Inference with a model that does not exist."""
    words = ["checkpoint=absent", "trainer.precision=bf16", "trainer.gpu=h100_80g"]
    paths = {"annotate": ["input=absent", "output=labelled"], "generate": ["prompt=Hi"]}
    paths["sample"] = ["prompts=absent", "annotated=absent", "target=[quality]", "output=absent"]
    return OmegaConf.to_object(draft(verb, INFERENCE[verb], [*words, *paths[verb]], values=values))


def test_generation_takes_weights_and_caches(room: Room) -> None:
    job = inference("sample", batch_size=7, **{"trainer.devices": 2, "parallel.tensor": 2})
    found = measure_inference(room, job, Architecture(**SMALL), longest=128)
    weights = (MATRICES + 2 * VOCABULARY) // 2 + NORMS
    assert (found.parameters, found.rows) == (weights, 7) and sum(found.parts.values()) == found.peak
    assert found.parts["parameters"] == pytest.approx(2 * weights, rel=0.02)
    caches = 7 * 128 * 4 * 2 * 256 // 2 * 2  # rows, tokens, layers, keys and values in bf16
    assert caches < found.parts["inference"] < 5 * caches


@pytest.mark.parametrize(
    ("verb", "values", "more", "rows"),
    [
        ("annotate", {"batch_tokens": 256}, {}, 4),
        ("annotate", {"batch_tokens": 256, "trainer.devices": 2, "parallel.pipeline": 2}, {"stage": 1}, 4),
        ("annotate", {"batch_tokens": 256, "distributions": True}, {"head": "generative"}, 4),
        ("generate", {"trainer.devices": 2, "parallel.pipeline": 2}, {}, 1),
    ],
    ids=str,
)
def test_every_kind_of_inference(room: Room, verb: str, values: dict, more: dict, rows: int) -> None:
    found = measure_inference(room, inference(verb, **values), Architecture(**SMALL), longest=64, **more)
    assert found.rows == rows and found.parts["inference"] > 0 and sum(found.parts.values()) == found.peak


@pytest.mark.parametrize(
    ("values", "stage", "message"),
    [
        ({}, 1, "stage 1: parallel.pipeline=1 has stages 0 to 0"),
        ({"trainer.precision": "fp8"}, 0, "trainer.precision=fp8 cannot be measured without a GPU"),
        ({"model.architecture": None, "model.init": "absent"}, 0, "the model has no shape to measure"),
    ],
    ids=str,
)
def test_refusals(values: dict[str, Any], stage: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(Room(), config("train-sft", **values), stage=stage)

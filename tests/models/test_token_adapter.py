"""Embeddings of attribute tokens beside adapters: how far they move, what stays, and that no layout changes that."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.megatron.token_adapter import SPEED
from tests.distributed import run_distributed
from tests.models.helpers import ARCHITECTURE, make_model, train
from tests.models.test_lora import LORA, OPTIMIZER, TIED, make_built

UNTIED = dataclasses.replace(ARCHITECTURE, num_layers=2)
RATE = 1e-3
TOKENS = [*range(100, 105), *range(200, 205), *range(300, 305)]


def train_alone(folder: str) -> dict:
    """One step of a model whose embedding is the projection too, and of one where it is not."""
    from nemo_steerlm.megatron import checkpoint, parallel

    root = Path(folder)
    found: dict[str, Any] = {}
    for name, architecture in (("tied", TIED), ("untied", UNTIED)):
        parallel.initialize(ParallelConfig(), seed=1)
        chunks = make_built("policy", architecture)
        checkpoint.save(root / f"init-{name}", checkpoint.model_state(chunks))
        base = {key: value.clone() for key, value in chunks[0].state_dict().items() if value is not None}

        def inspect(model: Any, base: dict = base, name: str = name, architecture: Any = architecture) -> None:
            tokens = torch.tensor([[7, 102, 300, 9, 204]])
            with torch.no_grad():
                adapted = model.chunks[0].eval()(tokens, None, None)
                model.save_pretrained(root / f"model-{name}")
                merged = make_model("policy", ParallelConfig(), architecture=architecture)
                merged.load_weights(root / f"model-{name}")
                found[f"{name} error"] = float((merged.chunks[0].eval()(tokens, None, None) - adapted).abs().max())
            now, embedding = merged.chunks[0].state_dict(), base["embedding.word_embeddings.weight"]
            change = now["embedding.word_embeddings.weight"] - embedding
            found[f"{name} moved"] = change.abs().amax(1).tolist()
            found[f"{name} expected"] = SPEED * RATE * float(embedding[:500].square().mean().sqrt())
            if "output_layer.weight" in base:
                found[f"{name} projection"] = torch.equal(now["output_layer.weight"], base["output_layer.weight"])

        settings: dict[str, Any] = dict(lora=LORA, optimizer={**OPTIMIZER, "lr": RATE}, architecture=architecture)
        train("policy", root / name, init=root / f"init-{name}", parallel=ParallelConfig(), steps=1, validate=False,
              inspect=inspect, **settings)  # fmt: skip
    found["curve"] = curve(folder, "one", ParallelConfig())
    return found


def curve(folder: str, name: str, layout: ParallelConfig) -> list[list[float]]:
    """Loss and gradient norm of some steps."""
    root = Path(folder)
    lines = train("policy", root / name, init=root / "init-tied", parallel=layout, steps=3, validate=False, lora=LORA,
                  optimizer=OPTIMIZER, architecture=TIED)  # fmt: skip
    return [[line["train/loss"], line["train/grad_norm"]] for line in lines]


def train_on_four(folder: str) -> list[list[float]]:
    """Two data-parallel ranks, which share the optimizer's state, of two stages, which share the embedding."""
    return curve(folder, "four", ParallelConfig(pipeline=2))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = str(tmp_path_factory.mktemp("rows"))
    return {**run_distributed(train_alone, 1, folder=folder), "four": run_distributed(train_on_four, 4, folder=folder)}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_step_moves_an_attribute_token_by_its_share_of_a_typical_embedding(found: dict, name: str) -> None:
    """AdamW's first step moves every number by the learning rate."""
    moved = found[f"{name} moved"]
    assert {token for token, far in enumerate(moved) if far} <= set(TOKENS)
    assert sum(moved[token] > 0 for token in TOKENS) >= 3  # those that the texts of a step hold
    for token in TOKENS:
        assert moved[token] == 0 or moved[token] == pytest.approx(found[f"{name} expected"], rel=1e-2)


def test_the_merged_model_computes_the_same(found: dict) -> None:
    assert found["tied error"] < 1e-5 and found["untied error"] < 1e-5
    assert found["untied projection"]


def test_the_copies_of_two_stages_train_alike_on_data_parallel_ranks(found: dict) -> None:
    for line, reference in zip(found["four"], found["curve"], strict=True):
        assert line == pytest.approx(reference, rel=1e-5)

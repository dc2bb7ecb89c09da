"""Adapters, frozen trunks, recomputed activations: what trains, what stays, and that no layout changes either."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.config import LORA_TARGETS, Architecture, ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import ARCHITECTURE, make_model, train

KINDS = ("regressor", "policy")
LORA = {"rank": 4, "alpha": 16.0, "targets": list(LORA_TARGETS)}
OPTIMIZER = {"lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.1}
ONE = ParallelConfig()
LAYOUTS: dict[str, dict] = {"tp2": dict(tensor=2), "tp2+sp": dict(tensor=2, sequence=True), "pp2": dict(pipeline=2)}
TIED = dataclasses.replace(ARCHITECTURE, num_layers=2, tie_word_embeddings=True)
DEEP = dataclasses.replace(TIED, num_layers=4)  # a layer for each of two virtual stages of two ranks
# What is trained beside frozen weights.
FROZEN: dict[str, dict] = {"adapters": {}, "attribute tokens": {"lora": {}, "freeze": "trunk"}}


def _run(kind: str, root: Path, name: str, parallel: ParallelConfig = ONE, **settings: Any) -> list[list[float]]:
    settings = {"validate": False, "lora": LORA, "optimizer": OPTIMIZER, "architecture": TIED, **settings}
    deep = "-deep" if settings["architecture"] is DEEP else ""
    lines = train(kind, root / f"{kind}-{name}", init=root / f"init-{kind}{deep}", parallel=parallel, **settings)
    return [[line["train/loss"], line["train/grad_norm"]] for line in lines]


def _resumed(kind: str, root: Path, name: str, start: str, parallel: ParallelConfig = ONE, **settings: Any) -> list:
    """Go on from step 2 of the run `start`."""
    from nemo_steerlm.megatron import parallel as processes

    processes.initialize(parallel, seed=1)
    if processes.is_rank_zero():
        step = "checkpoints/step-00000002"
        shutil.copytree(root / f"{kind}-{start}" / step, root / f"{kind}-{name}" / step)
    processes.barrier()
    return _run(kind, root, name, parallel, **settings)


def train_alone(folder: str) -> dict:
    """In one process: reference runs of both models, and everything that one process can show."""
    from nemo_steerlm.megatron import checkpoint, parallel

    root = Path(folder)
    found: dict[str, Any] = {}
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_steerlm.train.fit").addHandler(handler)
    logging.getLogger("nemo_steerlm.train.fit").setLevel(logging.INFO)
    for kind in KINDS:
        parallel.initialize(ONE, seed=1)
        chunks = make_built(kind)
        checkpoint.save(root / f"init-{kind}", checkpoint.model_state(chunks))
        base = {name: value.clone() for name, value in chunks[0].state_dict().items() if value is not None}

        def inspect(model: Any, kind: str = kind, base: dict = base) -> None:
            found[f"{kind} after"] = _look(model, base, root / f"model-{kind}")

        found[f"{kind} all weights"] = _run(kind, root, "all", steps=1, lora={})
        messages.clear()
        found[f"{kind} lora"] = _run(kind, root, "lora", checkpoint_every=2, inspect=inspect)
        found[f"{kind} messages"] = list(messages)

        def reopened(model: Any, kind: str = kind) -> None:
            found[f"{kind} reopened"] = _norm(model)

        _run(kind, root, "lora", inspect=reopened)  # it had ended: nothing is trained, the end is loaded
        for recompute in ("selective", "full"):
            found[f"{kind} {recompute}"] = _run(kind, root, recompute, steps=1, lora={}, recompute=recompute)
        found[f"{kind} full lora"] = _run(kind, root, "full-lora", steps=2, recompute="full")
    checkpoint.save(root / "init-policy-deep", checkpoint.model_state(make_built("policy", DEEP)))
    found["deep"] = _run("policy", root, "deep", architecture=DEEP, steps=2)
    dropped = {**LORA, "dropout": 0.2}
    found["dropout"] = _run("policy", root, "dropout", lora=dropped, checkpoint_every=2)
    found["dropout resumed"] = _resumed("policy", root, "again", "dropout", lora=dropped)
    found["dropout recomputed"] = _run("policy", root, "dropout-full", steps=2, lora=dropped, recompute="full")

    def head_only(model: Any) -> None:
        trained = {name for name, p in model.chunks[0].named_parameters() if p.requires_grad}
        initial = checkpoint.load(root / "init-regressor", checkpoint.model_state(make_built("regressor")))["model0"]
        now = model.chunks[0].state_dict()
        found["head only"] = {
            "trained": sorted(trained),
            "moved": sorted(n for n, v in initial.items() if v is not None and not torch.equal(v, now[n])),
            "buffers": sum(buffer.numel for buffer in model._wrapped[0][0].buffers),
        }

    for name, trained in FROZEN.items():
        with _frozen_gradients() as strides:  # in fp32 they are in order anyway
            _run("policy", root, f"packed {name}", steps=1, pack_length=64, precision="bf16", **trained)
        found[f"{name}: gradients"] = strides
    found["head only curve"] = _run("regressor", root, "head", lora={}, freeze="trunk", inspect=head_only)
    return found


@contextlib.contextmanager
def _frozen_gradients() -> Iterator[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Shape and strides of every gradient that meets a frozen weight."""
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

    own, found = LinearWithFrozenWeight.backward, []

    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        found.append((tuple(gradient.shape), gradient.stride()))
        return own(ctx, gradient)

    LinearWithFrozenWeight.backward = staticmethod(backward)
    try:
        yield found
    finally:
        LinearWithFrozenWeight.backward = staticmethod(own)


def _norm(model: Any) -> float:
    return sum(float(p.detach().norm()) for p in model.chunks[0].parameters() if p.requires_grad)


def make_built(kind: str, architecture: Architecture = TIED) -> list:
    """Chunks of a fresh model."""
    model = make_model(kind, ONE, architecture=architecture)
    model.build()
    return model.chunks


def _look(model: Any, base: dict[str, torch.Tensor], folder: Path) -> dict:
    """What a trained model holds, and whether the folder it writes computes the same."""
    from megatron.core import dist_checkpointing

    chunk = model.chunks[0].eval()
    tokens = torch.randint(1, 500, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = chunk(tokens, None, None)
        model.save_pretrained(folder)
        again = make_model(model.kind, ONE, architecture=TIED)
        again.load_weights(folder)
        merged = again.chunks[0].eval()(tokens, None, None)
        plain = make_model(model.kind, ONE, architecture=TIED)
        plain.build()
        plain.chunks[0].load_state_dict(base, strict=False)
        before = plain.chunks[0].eval()(tokens, None, None)
    now = chunk.state_dict()
    last = folder.parent / f"{model.kind}-lora/checkpoints/step-00000004"
    stored = dist_checkpointing.load_tensors_metadata(str(last))
    inner = getattr(model.optimizer, "chained_optimizers", [model.optimizer])[0]
    return {
        "moved": sorted(name for name, value in base.items() if not torch.equal(value, now[name])),
        "adapters": sum("_adapter." in name for name in now),
        "merged error": float((merged - adapted).abs().max() / adapted.abs().max()),
        "change": float((before - adapted).abs().max() / before.abs().max()),
        "written": sorted(again.chunks[0].state_dict()) == sorted(plain.chunks[0].state_dict()),
        "stored": sorted({n for n in stored if not n.startswith("optimizer")}),
        "norm": _norm(model),
        "trained": sum(p.numel() for p in chunk.parameters() if p.requires_grad),
        "buffers": sum(b.numel_unpadded for b in model._wrapped[0][0].buffers),
        "states": sum(s["exp_avg"].numel() for s in inner.optimizer.state.values()),
    }


def train_on_two(folder: str) -> dict:
    """In two processes: the same training at other layouts, and from the one-process checkpoint."""
    root = Path(folder)
    found: dict[str, Any] = {}
    for kind in KINDS:
        for name, layout in LAYOUTS.items():
            merged = partial(_merged, root / "model-tp2", found) if (kind, name) == ("policy", "tp2") else None
            found[f"{kind} {name}"] = _run(kind, root, name, ParallelConfig(**layout), inspect=merged)
            packed = dict(steps=2, pack_length=64)
            found[f"{kind} {name} packed"] = _run(kind, root, f"{name}-packed", ParallelConfig(**layout), **packed)
        split = ParallelConfig(tensor=2, sequence=True)
        found[f"{kind} resumed"] = _resumed(kind, root, "resumed", "lora", split)
    interleaved = ParallelConfig(pipeline=2, virtual_pipeline=2)
    found["deep vpp2"] = _run("policy", root, "vpp2", interleaved, architecture=DEEP, steps=2)
    found["policy tp2+sp full"] = _run("policy", root, "sp-full", split, steps=2, recompute="full")
    return found


def _merged(folder: Path, found: dict, model: Any) -> None:
    """Write the merged model at TP2, read it back there, compare this rank's logits."""
    tokens = torch.randint(1, 500, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = model.chunks[0].eval()(tokens, None, None)
        model.save_pretrained(folder)
        again = make_model("policy", ParallelConfig(tensor=2), architecture=TIED)
        again.load_weights(folder)
        error = (again.chunks[0].eval()(tokens, None, None) - adapted).abs().max() / adapted.abs().max()
    found["merged error at two"] = float(error)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = str(tmp_path_factory.mktemp("lora"))
    alone = run_distributed(train_alone, 1, folder=folder)
    return {**alone, **run_distributed(train_on_two, 2, folder=folder)}


def _same(one: list, two: list, rel: float = 1e-5) -> None:
    assert len(one) == len(two) > 0
    for line, reference in zip(one, two, strict=True):
        assert line == pytest.approx(reference, rel=rel)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_base(found: dict, kind: str) -> None:
    assert found[f"{kind} lora"][0][0] == pytest.approx(found[f"{kind} all weights"][0][0], rel=1e-6)
    assert found[f"{kind} lora"][3][0] < found[f"{kind} lora"][0][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_train_alike_at_every_layout(found: dict, kind: str, layout: str) -> None:
    _same(found[f"{kind} {layout}"], found[f"{kind} lora"])
    _same(found[f"{kind} {layout} packed"], found[f"{kind} lora"][:2])


def test_adapters_train_alike_in_virtual_stages(found: dict) -> None:
    _same(found["deep vpp2"], found["deep"])


@pytest.mark.parametrize("name", FROZEN)
def test_gradients_meet_frozen_weights_in_order(found: dict, name: str) -> None:
    """Under other strides torch multiplies token by token, even where a packed row makes them mean the same memory."""
    gradients = found[f"{name}: gradients"]
    assert {shape[-1] for shape, _ in gradients} > {TIED.hidden_size, 512}  # the padded vocabulary
    for shape, strides in gradients:
        assert tuple(strides) == torch.empty(shape, device="meta").stride()


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_stays_bit_for_bit_and_costs_no_training_state(found: dict, kind: str) -> None:
    after = found[f"{kind} after"]
    assert after["moved"] == (["score.weight"] if kind == "regressor" else [])
    assert after["adapters"] == 2 * 4 * TIED.num_layers + (kind == "policy")  # the attribute tokens
    assert after["states"] == after["trained"] <= after["buffers"] < after["trained"] + 64 * 40  # aligned starts
    heads = {"score.weight"} if kind == "regressor" else set()
    assert heads <= set(after["stored"])
    assert all("_adapter." in name for name in set(after["stored"]) - heads)
    assert len(found[f"{kind} messages"]) == 1 and f"{after['trained']:,} of" in found[f"{kind} messages"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_folder_holds_the_merged_model(found: dict, kind: str) -> None:
    after = found[f"{kind} after"]
    assert after["written"]
    assert after["merged error"] < 1e-6 < 1e-2 < after["change"]
    assert found["merged error at two"] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_goes_on_at_another_layout(found: dict, kind: str) -> None:
    _same(found[f"{kind} resumed"], found[f"{kind} lora"][2:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_had_ended_is_loaded(found: dict, kind: str) -> None:
    assert found[f"{kind} reopened"] == found[f"{kind} after"]["norm"]


def test_a_resumed_run_with_dropout_goes_on_bit_for_bit(found: dict) -> None:
    assert found["dropout resumed"] == found["dropout"][2:]
    assert found["dropout"][0][0] == found["policy lora"][0][0]  # B is zero
    assert found["dropout"][1] != found["policy lora"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_nothing(found: dict, kind: str) -> None:
    for recompute in ("selective", "full"):
        _same(found[f"{kind} {recompute}"], found[f"{kind} all weights"], 1e-6)
    _same(found[f"{kind} full lora"], found[f"{kind} lora"][:2], 1e-6)
    _same(found["dropout recomputed"], found["dropout"][:2], 1e-6)
    _same(found["policy tp2+sp full"], found["policy lora"][:2])


def test_a_frozen_trunk_trains_the_head_alone(found: dict) -> None:
    head = found["head only"]
    assert head["trained"] == head["moved"] == ["score.weight"]
    assert found["head only curve"][3][0] < found["head only curve"][0][0]

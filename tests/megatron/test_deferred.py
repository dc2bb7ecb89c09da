"""What inference does not load, and that whoever asks for it gets the real thing."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.megatron import deferred, parallel, patches
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.train.start import start_model
from tests.verbs.helpers import SCHEMA, make_world, policy_config, regressor_config

KEPT_OUT = {
    "wandb", "onnx", "tensorboard", "torch.utils.tensorboard", "torch._dynamo", "torch._inductor", "matplotlib",
    "scipy", "sklearn", "torchvision", "torchmetrics.functional", "torchmetrics.functional.text.bert",
    "nemo.utils.exp_manager", "nemo.collections",
}  # fmt: skip


def run_fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left as it is" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a regressor and a policy, neither of them trained."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    parallel.initialize()
    models = ((AttributeRegressor, regressor_config(folder)), (AttributeConditionedGPT, policy_config(folder)))
    for kind, config in models:
        start_model(kind, config, SCHEMA).save_pretrained(folder / kind.kind)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "generate checkpoint=policy prompt=Hello",
        "annotate checkpoint=regressor input=data/val.jsonl output=labelled.jsonl",
        "sample checkpoint=policy prompts=data/val.jsonl annotated=data/val.jsonl target=[quality] output=drawn.jsonl",
        "evaluate task=regressor checkpoint=regressor input=data/val.jsonl output=evaluation",
    ],
)
def test_inference_verbs_load_nothing_that_only_training_uses(world: Path, words: str) -> None:
    """Up to the moment at which they build their model."""
    code = f"""
import importlib, sys
from nemo_steerlm import cli

def build(model, **_):
    from nemo.core import ModelPT
    assert isinstance(model, ModelPT)
    found = {KEPT_OUT} & set(sys.modules)
    sys.exit(f"loaded: {{found}}" if found else 0)

load = importlib.import_module
def import_module(name, package=None):
    module = load(name, package)
    if name.startswith("nemo_steerlm.verbs."):
        sys.modules["nemo_steerlm.models.base"].MegatronModel.build = build
    return module

importlib.import_module = import_module
sys.exit(cli.main({words.split()}) or "no model was built")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=world, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_training_logs_to_wandb(world: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    words = (
        "train-sft attributes=synthetic model=llama_tiny model.tokenizer=tokenizer data.train=data/train.jsonl "
        "data.max_length=256 trainer.max_steps=1 trainer.global_batch_size=4 trainer.micro_batch_size=4 "
        "optimizer.lr=1e-3 steering.check=false logging.wandb=true logging.tensorboard=false output=run"
    )
    command = [sys.executable, "-m", "nemo_steerlm", *words.split()]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((world / "run" / "logs").glob("wandb/offline-run-*/*.wandb"))


def test_what_was_kept_out_is_there_for_whoever_imports_it() -> None:
    """Also for the libraries that loaded without it: they know the same classes."""
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    run_fresh(
        """
import sys, torch, nemo_steerlm.models
from lightning.fabric import wrappers
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from megatron.core import timers

network = torch.nn.Linear(1, 1)
assert not isinstance(network, (wrappers.OptimizedModule, timers.SummaryWriter))
assert not {"torch._dynamo", "torch.utils.tensorboard", "wandb"} & set(sys.modules)
import torch._dynamo, torch.utils.tensorboard, wandb
compiled = torch.compile(network)
assert isinstance(compiled, wrappers.OptimizedModule) and wrappers._unwrap_compiled(compiled)[0] is network
assert torch.utils.tensorboard.SummaryWriter is timers.SummaryWriter._real()
assert timers.wandb == wandb == timers.wandb and timers.wandb.init is wandb.init

import torchmetrics.text
assert torchmetrics.Metric in _ResultMetric.__mro__ and issubclass(torchmetrics.Accuracy, torchmetrics.Metric)
assert torchmetrics.functional.accuracy and torchmetrics.utilities.checks and torchmetrics.text.Perplexity
assert type(torchmetrics) is type(sys)
metric = torchmetrics.MeanMetric()
metric.update(3.0)
figure, axes = metric.plot()
assert figure.axes == [axes]
"""
    )


def test_a_compiled_function_brings_the_compiler_at_its_first_call() -> None:
    run_fresh(
        """
import sys, torch, nemo_steerlm.megatron
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu, swiglu
x, bias = torch.randn(3, 8), torch.randn(8)
assert "torch._dynamo" not in sys.modules
with torch.compiler.set_stance("force_eager"):
    gate, up = (x + bias).chunk(2, -1)
    torch.testing.assert_close(bias_swiglu(x, bias), torch.nn.functional.silu(gate) * up)
found = torch._dynamo.explain(lambda *inputs: bias_swiglu(*inputs) * 2)(x, bias)  # a compiled function of another
assert found.graph_count == 1 and found.graph_break_count == 0, found
assert torch.compile.__module__ == "torch"
"""
    )


# ---------------------------------------------------------------- any library


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of a function and a class; it notes when it runs."""
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("import sys\nsys.shelf_ran += 1\nfrom shelf.parts import Part\nrest = 1\n")
    (folder / "parts.py").write_text("from shelf.deep import heavy\nclass Part: ...\n")
    (folder / "deep" / "__init__.py").write_text("")
    (folder / "deep" / "heavy.py").write_text("class Heavy: ...\ndef twice(x): return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "shelf_ran", 0, raising=False)
    monkeypatch.setattr(patches, "_left", set())
    parts = {"shelf": {"Part": "shelf.parts"}, "shelf.deep.heavy": {"Heavy": None, "twice": None}}
    monkeypatch.setattr(deferred, "_PARTS", parts)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        del sys.modules[name]


def test_a_package_runs_when_it_is_asked_for_what_it_does_not_give_away(library: Path) -> None:
    with deferred.deferring():
        from shelf import Part
        from shelf.deep.heavy import Heavy, twice
    assert sys.shelf_ran == 0  # type: ignore[attr-defined]
    assert "shelf.deep.heavy" not in sys.modules and not hasattr(sys.modules["shelf.deep"], "heavy")
    assert not isinstance(Part(), Heavy) and "shelf.deep.heavy" not in sys.modules
    assert twice(4) == 8 and twice(x=4) == 8
    from shelf.deep import heavy

    assert isinstance(heavy.Heavy(), Heavy) and type(Heavy()) is heavy.Heavy

    class Own(Heavy): ...

    assert Own.__mro__ == (Own, heavy.Heavy, object) and (Heavy | None) == (None | Heavy)
    assert sys.shelf_ran == 0  # type: ignore[attr-defined]
    shelf = importlib.import_module("shelf")
    assert shelf.rest == 1 and shelf.Part is Part and shelf.parts.Part is Part
    assert sys.shelf_ran == 1 and type(shelf) is type(sys)  # type: ignore[attr-defined]


def test_a_package_runs_before_its_submodules(library: Path) -> None:
    with deferred.deferring():
        import shelf.deep

        assert sys.shelf_ran == 1  # type: ignore[attr-defined]
    assert shelf.rest == 1


def test_a_library_that_has_moved_its_parts_is_loaded_whole_and_told_of(
    library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (library / "parts.py").write_text("from shelf import gone\n")
    (library / "__init__.py").write_text("import sys\nsys.shelf_ran += 1\nclass Part: ...\n")
    with caplog.at_level(logging.WARNING), deferred.deferring():
        from shelf import Part
    assert sys.shelf_ran == 1 and Part.__module__ == "shelf"  # type: ignore[attr-defined]
    (record,) = caplog.records
    assert "shelf is left as it is" in record.getMessage() and "gone" in record.getMessage()


def test_a_library_that_cannot_be_loaded_says_so_when_it_is_used(library: Path) -> None:
    (library / "__init__.py").write_text("raise ImportError('no shelf')\n")
    with deferred.deferring():
        import shelf
    for _ in range(2):
        with pytest.raises(ImportError, match="no shelf"):
            _ = shelf.rest


def test_everything_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    before: list[Any] = [list(sys.meta_path), torch.compile, gc.isenabled()]
    with pytest.raises(ZeroDivisionError), deferred.deferring():
        assert not gc.isenabled() and torch.compile is not before[1]
        _ = 1 / 0
    assert [sys.meta_path, torch.compile, gc.isenabled()] == before


def test_only_functions_wait_for_the_compiler() -> None:
    seen = []

    def compile_(model: Any = None, **settings: Any) -> Any:
        seen.append(settings)
        return model

    late, network = deferred._late(compile_, inline=True), torch.nn.Linear(1, 1)
    assert late(network) is late(model=network) is network and seen == [{}, {}]

    @late(dynamic=True)
    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    assert len(seen) == 2 and double.__doc__ == "Twice."
    assert double(2) == double(x=2) == 4 and seen[2:] == [{"dynamic": True}]

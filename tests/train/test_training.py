"""What training promises beside the layouts: accumulation, bf16, clipping, schedules, resharded resume, dropout."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from nemo_steerlm.config import Architecture, OptimizerConfig, ParallelConfig
from tests.distributed import run_distributed
from tests.models.helpers import ARCHITECTURE, OPTIMIZER, make_model, train

CURVE = ("train/loss", "train/grad_norm", "val/loss")


def _curve(lines: list[dict]) -> list[dict]:
    return [{k: line[k] for k in CURVE if k in line} for line in lines]


def _copy_checkpoint(run: Path, step: int, target: Path) -> Path:
    shutil.copytree(run / f"checkpoints/step-{step:08d}", target / f"checkpoints/step-{step:08d}")
    return target


def train_alone(folder: str) -> dict:
    """In one process: the reference run and its variants."""
    from nemo_steerlm.megatron import checkpoint, parallel

    root, one = Path(folder), ParallelConfig()
    parallel.initialize(one, seed=1)
    model = make_model("policy", one)
    model.build()
    init = root / "init"
    checkpoint.save(init, checkpoint.model_state(model.chunks))
    settings = dict(init=init, parallel=one)

    def run(name: str, **changes) -> list[dict]:
        return _curve(train("policy", root / name, **{**settings, **changes}))

    optimizer = {k: getattr(OPTIMIZER, k) for k in ("lr", "warmup_steps", "schedule", "weight_decay")}
    curves = {
        "reference": run("reference", micro_batch_size=2, steps=6, checkpoint_every=2),
        "one micro-batch": run("whole", micro_batch_size=8, steps=6),
        "eight micro-batches": run("single", micro_batch_size=1, steps=6),
        "bf16": run("bf16", steps=6, precision="bf16"),
        "bf16 resumed": None,
        "not distributed": run("plain", steps=6, optimizer={**optimizer, "distributed": False}),
        "overlap": run("overlap", steps=6, optimizer={**optimizer, "overlap": True}),
        "unclipped": run("unclipped", steps=2, optimizer={**optimizer, "clip_grad": 0.0}),
    }
    run("bf16-parts", steps=6, precision="bf16", checkpoint_every=4)
    again = _copy_checkpoint(root / "bf16-parts", 4, root / "bf16-again")
    curves["five layers"] = _five_layers(root, "five-alone", one)
    curves["bf16 resumed"] = run(again.name, steps=6, precision="bf16")
    return curves


def _five_layers(root: Path, name: str, layout: ParallelConfig) -> list[dict]:
    """Train a network that two stages cannot share evenly."""
    from nemo_steerlm.megatron import checkpoint, parallel

    architecture = dataclasses.replace(ARCHITECTURE, num_layers=5)
    init = root / "init-five"
    if not init.exists():
        parallel.initialize(layout, seed=1)
        model = make_model("policy", layout, architecture=architecture)
        model.build()
        checkpoint.save(init, checkpoint.model_state(model.chunks))
    return _curve(train("policy", root / name, init=init, parallel=layout, steps=2, architecture=architecture))


def resume_elsewhere(folder: str) -> dict:
    """In two processes: go on from the one-process checkpoint of step 4 at other layouts."""
    curves = {}
    layouts: dict[str, dict] = {
        "tp2+sp": dict(tensor=2, sequence=True),
        "pp2": dict(pipeline=2),
        "pp2+vpp2": dict(pipeline=2, virtual_pipeline=2),
        "dp2": {},
    }
    for name, layout in layouts.items():
        from nemo_steerlm.megatron import parallel

        parallel.initialize(ParallelConfig(**layout), seed=1)
        target = Path(folder) / f"resumed-{name}"
        if parallel.is_rank_zero():
            _copy_checkpoint(Path(folder) / "reference", 4, target)
        parallel.barrier()
        curves[name] = _curve(train("policy", target, init=None, parallel=ParallelConfig(**layout), steps=6))
    curves["five layers on two stages"] = _five_layers(Path(folder), "five-pp2", ParallelConfig(pipeline=2))
    return {**curves, **_dropout_streams()}


def _dropout_streams() -> dict:
    """Masks that the named streams draw on two tensor-parallel ranks, and a training with dropout at TP2."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from nemo_steerlm.megatron import parallel

    parallel.initialize(ParallelConfig(tensor=2), seed=1)
    drawn = {}
    for step in (0, 1):
        parallel.seed_everything(1 + step)
        for name in ("model-parallel-rng", "data-parallel-rng"):
            with get_cuda_rng_tracker().fork(name):
                mine = torch.rand(4)
            both = [torch.empty(4) for _ in range(2)]
            dist.all_gather(both, mine)
            drawn[f"{name} {step}"] = [t.tolist() for t in both]
    return {"streams": drawn}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = str(tmp_path_factory.mktemp("training"))
    alone = run_distributed(train_alone, 1, folder=folder)
    return {**alone, **run_distributed(resume_elsewhere, 2, folder=folder)}


def _same(found: list[dict], expected: list[dict], rel: float) -> None:
    assert len(found) == len(expected) > 0
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=rel, abs=1e-6)


@pytest.mark.parametrize("name", ["one micro-batch", "eight micro-batches", "not distributed", "overlap"])
def test_how_the_batch_is_cut_and_reduced_changes_nothing(curves: dict, name: str) -> None:
    _same(curves[name], curves["reference"], 1e-5)


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "pp2+vpp2", "dp2"])
def test_a_checkpoint_goes_on_at_another_layout_with_its_optimizer(curves: dict, layout: str) -> None:
    later = [line for line in curves["reference"]][-4:]  # validation of step 4, steps 5 and 6, validation of step 6
    assert "val/loss" in later[0] and len(later) == 4
    _same(curves[layout], later, 1e-5)


def test_stages_need_not_be_even(curves: dict) -> None:
    _same(curves["five layers on two stages"], curves["five layers"], 1e-5)


def test_bf16_follows_fp32_and_resumes_exactly(curves: dict) -> None:
    _same(curves["bf16"], curves["reference"], 2e-2)
    assert curves["bf16"] != curves["reference"]
    assert curves["bf16 resumed"] == curves["bf16"][-4:]


def test_clipping_bounds_the_step(curves: dict) -> None:
    assert curves["reference"][0]["train/grad_norm"] > 1.0  # so that clipping at 1 had something to do
    assert curves["unclipped"][0] == curves["reference"][0]
    assert curves["unclipped"][1]["train/loss"] == pytest.approx(curves["reference"][1]["train/loss"], rel=1e-3)
    assert curves["unclipped"][1] != curves["reference"][1]


def test_dropout_streams_differ_where_weights_are_split_and_agree_where_they_are_copied(curves: dict) -> None:
    streams = curves["streams"]
    for step in (0, 1):
        first, second = streams[f"model-parallel-rng {step}"]
        assert first != second
        first, second = streams[f"data-parallel-rng {step}"]
        assert first == second
    assert streams["model-parallel-rng 0"] != streams["model-parallel-rng 1"]


def test_learning_rate_schedules() -> None:
    from nemo_steerlm.megatron.optim import learning_rate

    cosine = OptimizerConfig(lr=1.0, min_lr=0.1, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(cosine, step, 14) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[9] == pytest.approx(0.55) and rates[14] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.2)))
    constant = OptimizerConfig(lr=1.0, schedule="constant", warmup_steps=0)
    assert [learning_rate(constant, step, 3) for step in range(3)] == [1.0] * 3


def weight_decay_groups() -> dict:
    """Which parameters of a regressor decay."""
    from nemo_steerlm.megatron import optim

    model = make_model("regressor", ParallelConfig())
    model.configure_model()
    model.configure_optimizers()
    optim.schedule(model.optimizer, OPTIMIZER, 0, 4)
    names = {id(p): n for chunk in model.chunks for n, p in chunk.named_parameters()}
    decayed = []
    inner = (
        model.optimizer.chained_optimizers[0] if hasattr(model.optimizer, "chained_optimizers") else model.optimizer
    )
    for parameters, group in zip(inner.model_fp32_groups, inner.optimizer.param_groups, strict=True):
        decayed += [names[id(p)] for p in parameters if group["weight_decay"] > 0]
    return {"decayed": decayed, "all": sorted(names.values())}


def test_norms_and_biases_do_not_decay() -> None:
    result = run_distributed(weight_decay_groups, 1)
    assert "score.weight" in result["decayed"]
    spared = set(result["all"]) - set(result["decayed"])
    assert spared and all("norm" in name or name.endswith("bias") for name in spared)


def cross_entropy_on_ranks(seed: int) -> list[float]:
    """Sum, count and gradient norm of the policy's loss, the vocabulary split over the ranks."""
    import torch.distributed as dist

    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.megatron.cross_entropy import cross_entropy

    parallel.initialize(ParallelConfig(tensor=int(os.environ["WORLD_SIZE"])), seed=1)
    logits, targets, mask = _logits(seed)
    world, rank = dist.get_world_size(), dist.get_rank()
    mine = logits.chunk(world, -1)[rank].clone().requires_grad_()
    total, count = cross_entropy((mine * 1.0)[mask], targets[mask], vocab_size=13)
    total.backward()
    assert mine.grad is not None
    norm = (mine.grad**2).sum()
    dist.all_reduce(norm)
    return [float(total), float(count), float(norm)]


def _logits(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 16, generator=generator) * 3
    return logits, torch.randint(0, 13, (2, 5), generator=generator), torch.rand(2, 5, generator=generator) < 0.6


def test_policy_loss_ignores_masked_tokens_and_vocabulary_padding() -> None:
    logits, targets, mask = _logits(4)
    reference = logits[..., :13].double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(reference[mask], targets[mask], reduction="sum")
    loss.backward()
    assert reference.grad is not None
    expected = [float(loss), float(mask.sum()), float((reference.grad**2).sum())]
    assert run_distributed(cross_entropy_on_ranks, 1, seed=4) == pytest.approx(expected, rel=1e-5)
    assert run_distributed(cross_entropy_on_ranks, 2, seed=4) == pytest.approx(expected, rel=1e-5)


def test_padded_vocabulary_is_the_same_for_every_layout() -> None:
    from nemo_steerlm.config.layout import padded_vocabulary

    assert padded_vocabulary(Architecture(vocab_size=500)) == 512
    assert padded_vocabulary(ARCHITECTURE) == 512

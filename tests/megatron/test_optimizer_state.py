"""Every data-parallel rank writes its share of a checkpoint, and none gathers what the others hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.megatron.optimizer_state import boxes
from tests.distributed import run_distributed
from tests.models.helpers import make_model


def save_on_four(folder: str) -> dict[str, Any]:
    """TP2 x DP2: the bytes each rank writes and allocates; megatron-core's gathering save beside; PP2 x DP2 reads."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_steerlm.megatron import checkpoint, parallel

    root, found = Path(folder), dict[str, Any]()
    model, inner = _model_with_moments(ParallelConfig(tensor=2))
    state, found["peak of describing"] = _peak(lambda: _state(model))
    _, found["peak of writing"] = _peak(lambda: checkpoint.save(root / "own", state))
    found["files"] = {file.name: file.stat().st_size for file in root.glob("own/*.distcp")}
    moments = {name: value.clone() for name, value in _moments(inner).items()}
    found["own share"] = 4 * sum(value.numel() for value in moments.values())

    ours = {name: inner.__dict__.pop(name) for name in list(inner.__dict__) if "fully_reshardable" in name}
    gathered, found["peak of gathering"] = _peak(lambda: _state(model))
    checkpoint.save(root / "gathered", gathered)
    found["they read ours"] = _read(model, inner, root / "own", moments)
    inner.__dict__.update(ours)
    found["we read theirs"] = _read(model, inner, root / "gathered", moments)
    found["we read ours"] = _read(model, inner, root / "own", moments)
    assert parallel_state.get_data_parallel_world_size() == 2

    parallel.initialize(ParallelConfig(pipeline=2), seed=1)
    model, inner = _model_with_moments(ParallelConfig(pipeline=2))
    _load(model, root / "own")
    checkpoint.save(root / "again", _state(model))
    stored = {name: _tensors(root / name) for name in ("own", "gathered", "again")}
    found["names"] = len(stored["own"])
    for name in ("gathered", "again"):
        assert stored[name].keys() == stored["own"].keys()
        found[f"differ in {name}"] = [k for k, v in stored[name].items() if not torch.equal(v, stored["own"][k])]
    ranks: list[Any] = [None] * 4
    dist.all_gather_object(ranks, found)
    return {**found, "ranks": ranks}


def _model_with_moments(layout: ParallelConfig) -> tuple[Any, Any]:
    """A model with an optimizer whose moments are random; what is copied on ranks is equal there."""
    from nemo_steerlm.megatron import parallel

    parallel.initialize(layout, seed=1)
    model = make_model("policy", layout)
    model.build()
    model.configure_model()
    model.configure_optimizers()
    inner = getattr(model.optimizer, "chained_optimizers", [model.optimizer])[0]
    inner._init_optimizer_states_with_dummy_values()
    for chunk in model._wrapped[0]:
        chunk.start_param_sync(force_sync=True)  # each rank has stepped its share alone
    torch.manual_seed(0)
    for value in _moments(inner).values():
        value.normal_()
    return model, inner


def _moments(inner: Any) -> dict[str, torch.Tensor]:
    states = enumerate(inner.optimizer.state.values())
    return {f"{index}.{name}": state[name] for index, state in states for name in ("exp_avg", "exp_avg_sq")}


def _state(model: Any, is_loading: bool = False) -> dict[str, Any]:
    from nemo_steerlm.megatron import checkpoint

    state, metadata = model.training_state(), checkpoint.metadata()
    optimizer = model.optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return {**state, "optimizer": optimizer}


def _load(model: Any, folder: Path) -> None:
    from nemo_steerlm.megatron import checkpoint

    loaded = checkpoint.load(folder, _state(model, is_loading=True))
    model.load_training_state(loaded)
    model.optimizer.load_state_dict(loaded["optimizer"])


def _read(model: Any, inner: Any, folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a checkpoint brings every moment of this rank back."""
    for value in _moments(inner).values():
        value.zero_()
    _load(model, folder)
    return all(torch.equal(value, expected[name]) for name, value in _moments(inner).items())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _peak(function: Callable[[], Any]) -> tuple[Any, int]:
    """A call's result, and by how many bytes torch's tensors grew at most while it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, peak


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(save_on_four, 4, folder=str(tmp_path_factory.mktemp("saves")))


def test_every_data_parallel_rank_writes_a_like_share(saved: dict[str, Any]) -> None:
    sizes = saved["files"].values()
    assert set(saved["files"]) == {f"__{rank}_0.distcp" for rank in range(4)}
    assert max(sizes) < 1.3 * min(sizes), saved["files"]


def test_no_rank_holds_more_than_its_own_share(saved: dict[str, Any]) -> None:
    """A rank holds its share of two moments and of the main parameters."""
    for rank in saved["ranks"]:
        share = 1.5 * rank["own share"]
        assert rank["peak of gathering"] > 2 * share, "the figure that shows what is avoided"
        assert rank["peak of describing"] < 0.05 * share
        assert rank["peak of writing"] < 1.5 * share  # on a CPU megatron-core copies what is written; on a GPU nothing


def test_what_is_stored_is_what_a_gathering_save_stores(saved: dict[str, Any]) -> None:
    assert saved["names"] == 4 * 9  # the weights, and three of the optimizer for each
    assert saved["differ in gathered"] == [] and saved["differ in again"] == []
    for rank in saved["ranks"]:
        assert rank["we read ours"] and rank["we read theirs"] and rank["they read ours"]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 6)])
def test_boxes_cover_a_range_once_and_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            covered = []
            for first, offset, size in boxes(shape, start, stop):
                box = whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten().tolist()
                assert box[0] == first and len(box) > 0
                covered += box
            assert covered == list(range(start, stop))
            assert len(list(boxes(shape, start, stop))) <= 2 * len(shape) - 1

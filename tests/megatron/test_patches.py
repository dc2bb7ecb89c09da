"""Every patch of a library bears an argument that it does not know, and a library without the part that it patches."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random as megatron_random
from torch.distributed import distributed_c10d

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import checkpoint, cpu, decoding, gpt, layers, optim, optimizer_state, parallel, patches
from nemo_steerlm.train.strategy import DistributedCheckpointIO, MegatronStrategy
from tests.models.helpers import ARCHITECTURE

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="most of the patches stand in for CUDA")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What patches say of a library that does not fit, from here on."""
    parallel.initialize()
    monkeypatch.setattr(patches, "_left", set())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(patches.__name__)
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def check_told(told: list[str], *words: str) -> None:
    (line,) = told
    assert all(word in line for word in words) and "\n" not in line, line


# ---------------------------------------------------------------- torch on a CPU


def test_a_process_group_is_made_with_whatever_torch_passes(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Newer(distributed_c10d.ProcessGroupGloo):
        """A torch whose groups take a setting that its options do not have."""

        def __init__(self, *args: Any, surprise: int = 0, **kwargs: Any) -> None:
            seen.append(surprise)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(distributed_c10d, "ProcessGroupGloo", Newer)
    with cpu.one_gloo_device():
        store = dist.HashStore()  # type: ignore[attr-defined]
        make: Any = functools.partial(distributed_c10d.ProcessGroupGloo, store, 0, 1)
        groups = [make(timeout=timedelta(seconds=9), surprise=7) for _ in range(2)]
        assert seen == [7, 7]
        check_told(told, "torch", "ProcessGroupGloo", "surprise")
        groups.append(make(timeout=timedelta(seconds=9)))
        groups.append(make(timedelta(seconds=9)))
        assert seen == [7, 7, 0, 0]
    for group in groups:
        group.barrier().wait()
    assert len(told) == 1 and distributed_c10d.ProcessGroupGloo is Newer


def test_a_torch_without_gloo_devices_makes_its_own_groups(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer:
        _Options = object

    monkeypatch.setattr(distributed_c10d, "ProcessGroupGloo", Newer)
    with cpu.one_gloo_device():
        assert distributed_c10d.ProcessGroupGloo is Newer
    check_told(told, "ProcessGroupGloo", "create_default_device")


def test_what_stands_in_for_cuda_takes_unknown_arguments(told: list[str]) -> None:
    library: Any = torch  # whose own types do not know the argument
    event = library.cuda.Event(True, enable_timing=True, surprise=1)
    event.record(None, surprise=1)
    event.synchronize(surprise=1)
    assert event.elapsed_time(event, surprise=1) == 0.0
    assert library.cuda.current_device(surprise=1) == torch.device("cpu")
    assert library.cuda.device_count(surprise=1) == 1 and not library.cuda.is_available(surprise=1)
    for name in cpu._NO_OPERATION:
        assert getattr(torch.cuda, name)(1, surprise=1) is None
    library.cuda.manual_seed(seed=5, surprise=1)
    state = library.cuda.get_rng_state(0, surprise=1)
    drawn = torch.rand(3)
    for put in (library.cuda.set_rng_state, library.cuda.random.set_rng_state, megatron_random._set_cuda_rng_state):
        put(new_state=state, device=0, surprise=1)
        assert torch.equal(torch.rand(3), drawn)
    assert library.zeros(1).cuda(0, surprise=1).device.type == "cpu"
    with pytest.raises(TypeError, match="surprise"):  # torch's own answer: it was passed on
        library.zeros(1, device="cuda", surprise=1)
    with pytest.raises(TypeError):
        library.zeros(1).to("cuda", surprise=1)


def test_a_collective_with_an_unknown_argument_is_torchs_own(told: list[str]) -> None:
    def broadcast(tensor: torch.Tensor, src: int, group: Any = None, surprise: int = 0) -> int:
        return surprise

    patched = cpu._unless_alone(broadcast)
    assert patched(torch.zeros(1), 0) is None
    assert patched(torch.zeros(1), 0, surprise=7) == 7


def test_a_megatron_without_the_names_that_the_cpu_needs_is_told_of(told: list[str]) -> None:
    empty = types.ModuleType("megatron.core.tensor_parallel.random")
    assert not patches.replace(empty, "dropout differs", _set_cuda_rng_state=None)
    assert not patches.replace(empty, "dropout differs", _set_cuda_rng_state=None)
    assert not hasattr(empty, "_set_cuda_rng_state")
    check_told(told, "megatron-core 0.", "megatron.core.tensor_parallel.random", "_set_cuda_rng_state", "dropout")


# ---------------------------------------------------------------- the optimizer


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """A distributed optimizer's four methods, each with an argument that today's do not have."""

    class Newer:
        optimizer: Any

        def _get_main_param_and_optimizer_states(self, model_param: Any, surprise: int = 0) -> dict:
            return {"param": 1, "step": 2, "surprise": surprise}

        def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict, surprise: int = 0) -> None:
            self.put = {**tensors, "surprise": surprise}

        def state_dict(self, surprise: int = 0) -> dict:
            return {"surprise": surprise}

        def load_state_dict(self, state: dict, surprise: int = 0) -> None:
            self.optimizer.load_state_dict(state, surprise=surprise)

        def _init_optimizer_states_with_dummy_values(self) -> None: ...

    monkeypatch.setattr(optim, "DistributedOptimizer", Newer)
    monkeypatch.setattr(optim, "_repaired", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", torch.optim.AdamW)
    return Newer


def test_the_repaired_optimizer_passes_unknown_arguments_on(told: list[str], stock: type[Any]) -> None:
    class Inner:
        state = {"a": 1}

        def load_state_dict(self, state: dict, surprise: int = 0) -> None:
            self.loaded = state, surprise

    optim._repair_resume()
    new = stock()
    new.optimizer = Inner()
    assert new._get_main_param_and_optimizer_states(None, surprise=7) == {"param": 1, "surprise": 7}
    new._set_main_param_and_optimizer_states(None, {"param": 3}, surprise=7)
    assert new.put == {"param": 3, "step": 2, "surprise": 7}  # its own step, as it was
    assert new.state_dict(surprise=7) == {"surprise": 7}
    step = torch.tensor(4.0)
    new.load_state_dict({"state": {0: {"step": step}, 1: {"step": step}}}, surprise=7)
    loaded, surprise = new.optimizer.loaded
    assert surprise == 7 and loaded["state"][0]["step"] is not loaded["state"][1]["step"]
    assert not told


def test_an_optimizer_without_the_repaired_parts_is_left_whole(told: list[str], stock: type[Any]) -> None:
    del stock._set_main_param_and_optimizer_states
    before = stock.state_dict
    optim._repair_resume()
    assert stock.state_dict is before
    check_told(told, "Newer", "_set_main_param_and_optimizer_states", "resumed")


def test_an_optimizer_with_other_names_saves_and_orders_as_ever(
    told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Newer:
        sharded_param_state_fully_reshardable = None

    monkeypatch.setattr(optimizer_state, "DistributedOptimizer", Newer)
    new: Any = Newer()
    optimizer_state.write_own_share(new)
    assert not vars(new)
    check_told(told, "Newer", "load_parameter_state_from_fully_reshardable", "gathered")
    told.clear()
    optim._repair_order(new)
    check_told(told, "DistributedOptimizer", "model_param_group_index_map", "fp32 head")


def test_megatrons_optimizer_has_what_is_repaired() -> None:
    assert all(hasattr(DistributedOptimizer, name) for name in (*optim._RESUME, optim._INITIALISE))


# ---------------------------------------------------------------- the network


@pytest.fixture(scope="module")
def model() -> gpt.LanguageModel:
    parallel.initialize(seed=3)
    (chunk,) = gpt.build(ARCHITECTURE, ParallelConfig())
    return chunk


def test_linears_being_served_take_unknown_arguments(
    told: list[str], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = model.decoder.layers[0].mlp.linear_fc2
    x, seen = torch.randn(3, 1, linear.weight.shape[1]), []

    def newer(
        self: Any, input: torch.Tensor, weight: torch.Tensor, *args: Any, surprise: int = 0, **kwargs: Any
    ) -> Any:
        seen.append(surprise)
        return F.linear(input, weight)

    monkeypatch.setattr(tensor_parallel.RowParallelLinear, "_forward_impl", newer)
    with decoding.serving(model):
        product = linear._forward_impl(input=x, weight=linear.weight, bias=None, allreduce_dgrad=False)
        assert not seen and not told
        assert torch.equal(linear._forward_impl(input=x, weight=linear.weight, bias=None, surprise=7), product)
        assert seen == [7]
    check_told(told, "megatron-core 0.", "tensor_parallel.layers", "surprise")


def test_linears_without_the_hook_serve_as_they_are(
    told: list[str], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (tensor_parallel.RowParallelLinear, tensor_parallel.ColumnParallelLinear):
        monkeypatch.delattr(kind, "_forward_impl")
    with decoding.serving(model):
        assert not hasattr(model.output_layer, "_forward_impl")
    check_told(told, "_forward_impl", "slower")


def test_core_attention_ignores_unknown_arguments_and_says_so(told: list[str], model: Any) -> None:
    attention = model.decoder.layers[0].self_attention.core_attention
    query, key, value = torch.randn(3, 5, 1, 2, 8)
    expected = attention(query, key, value, None)
    assert torch.equal(attention(query, key, value, None, surprise=None), expected) and not told
    assert torch.equal(attention(query, key, value, None, surprise=1), expected)
    check_told(told, "attention", "surprise")


def test_an_mlp_without_a_place_for_our_activation_keeps_its_own(told: list[str]) -> None:
    config = types.SimpleNamespace(use_te_activation_func=True)
    layers._use_swiglu(functools.partial(print, submodules=object()), config)
    assert not config.use_te_activation_func
    check_told(told, "megatron.core.transformer.mlp", "activation_func", "slower")


def test_the_hooks_of_gpt_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = GPTModel._postprocess
    monkeypatch.setattr(GPTModel, "_postprocess", lambda self, *args, surprise, **kwargs: (newer, surprise))
    assert model._postprocess(torch.zeros(1), surprise=7) == (newer, 7)
    (regressor,) = gpt.build(ARCHITECTURE, ParallelConfig(), outputs=2)
    hidden = torch.zeros(4, 1, ARCHITECTURE.hidden_size)
    assert regressor._postprocess(hidden_states=hidden, surprise=7).shape == (1, 4, 2)
    monkeypatch.delattr(GPTModel, "_postprocess")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.\d+\.\d+ has no GPTModel._postprocess"):
        gpt.build(ARCHITECTURE, ParallelConfig())


# ---------------------------------------------------------------- checkpoints, Lightning


def test_a_checkpoint_is_written_at_once_where_the_writer_is_another(
    told: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = filesystem_async.FileSystemWriterAsync
    assert checkpoint.background_fits() and not told
    io = DistributedCheckpointIO(background=True)

    def newer(transform_list: Any, write_bucket: Any, needed: Any) -> None: ...

    with monkeypatch.context() as other:
        other.setattr(writer, "write_preloaded_data", staticmethod(newer))
        assert not checkpoint.background_fits()
    with monkeypatch.context() as other:
        other.setattr(dist_checkpointing, "save", lambda sharded_state_dict, checkpoint_dir: None)
        assert not checkpoint.background_fits()
    check_told(told, "megatron-core 0.", "FileSystemWriterAsync", "async_checkpoint")
    monkeypatch.setattr(checkpoint, "background_fits", lambda: False)
    io.save_checkpoint({"sharded": {}, "common": {"step": 2}}, tmp_path / "step")
    assert io.pending is None and checkpoint.load(tmp_path / "step", {})["common"]["step"] == 2


def test_lightning_may_pass_more_to_its_hooks() -> None:
    network = torch.nn.Linear(1, 1)
    strategy = MegatronStrategy(DistributedCheckpointIO())
    assert strategy._setup_model(network, surprise=7) is network

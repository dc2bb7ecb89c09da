"""What a training step asks of the device: one copy of each batch, and no answer before its end."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import utils as megatron_utils
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_l2_norm
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_steerlm.config import OptimizerConfig, ParallelConfig, PolicyDataConfig, TrainerConfig, TrainSftConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import gpt, optim, parallel
from nemo_steerlm.models import base, training
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.training import to_device
from nemo_steerlm.train import fit
from nemo_steerlm.train.batches import collate_policy
from nemo_steerlm.train.tasks import ConditionedSFTTask
from tests.models.helpers import ARCHITECTURE, make_batches, make_model, random_items, train

aten = torch.ops.aten
META = torch.device("meta")  # a device that is not the CPU, and that every machine has


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: values that go back to Python, and results whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func in (aten.index.Tensor, aten.index_put_.default)
        masks = indexed and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func is aten.index_put_.default and args[2].numel() == 1:
            masks = False  # torch fills by a mask without finding its places
        readers = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero)
        if masks or func.overloadpacket in readers:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_places_of_a_policy_s_batch_are_its_mask() -> None:
    items = [*random_items("policy", 3), None]
    batch = collate_policy(items, range(0, 4 * 48, 48), (4, 48))
    follows = np.zeros((4, 48), bool)
    for row, item in enumerate(items):
        if item is not None:
            follows[row, : len(item["tokens"]) - 1] = item["loss_mask"][1:]
    assert batch["places"].tolist() == np.flatnonzero(follows).tolist() != []
    assert batch["targets"].tolist() == [
        int(token) for item in items if item is not None for token in item["tokens"][item["loss_mask"]]
    ]
    empty = collate_policy([None], [0], (1, 8))
    assert empty["places"].shape == empty["targets"].shape == (0,)


def test_the_logits_of_places_are_those_of_the_whole_batch() -> None:
    model = make_model("policy", ParallelConfig())
    model.build()
    tokens = torch.randint(1, 500, (3, 16), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 5, 15, 16, 20, 47])
    with torch.no_grad():
        logits, chosen = model.chunks[0](tokens, None, None), model.chunks[0](tokens, None, None, places=places)
    torch.testing.assert_close(chosen, logits.flatten(0, 1)[places])


@pytest.mark.parametrize("pack_length", [None, 64])
def test_a_batch_goes_to_the_device_whole(pack_length: int | None) -> None:
    items = random_items("policy", 8)
    cut: dict[str, Any] = dict(steps=1, micro_batch_size=4, parallel=ParallelConfig(), pack_length=pack_length)
    for batch in make_batches("policy", items, **cut)[0]:
        moved = to_device(batch, META)
        assert {x.device for x in moved.values() if isinstance(x, torch.Tensor)} == {META}
        segments = moved["segments"]
        assert segments.positions.device == segments.bounds.device == META
        assert segments.lengths == batch.get("segments", [batch["tokens"].shape[1]])


def test_a_batch_is_moved_once_and_by_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("policy", ParallelConfig())
    batches = make_batches("policy", random_items("policy", 8), steps=1, micro_batch_size=4, parallel=model.parallel)
    seen: list[dict[str, Any]] = []

    def chunk(tokens: torch.Tensor, *_: Any, **given: Any) -> torch.Tensor:
        seen.append({"tokens": tokens, **given})
        return tokens

    def schedule(forward_step_func: Any, data_iterator: Any, model: Any, num_microbatches: int, **others: Any) -> list:
        for iterator, one in zip(data_iterator, model, strict=True):
            for _ in range(num_microbatches):
                forward_step_func(iterator, one)
        return []

    monkeypatch.setattr(training, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(parallel, "device", lambda: META)
    model.chunks = [chunk, chunk]  # two virtual stages
    given = batches[0]
    assert model.transfer_batch_to_device(given, META, 0) is given  # Lightning leaves it to `run`
    model.run(given, forward_only=True)
    assert len(seen) == 4 and {x.device for x in (seen[0]["tokens"], seen[0]["places"])} == {META}
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert all(first[name] is second[name] for name in ("tokens", "places", "packed_seq_params"))


def test_batches_are_pinned_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches("policy", random_items("policy", 8), steps=1, micro_batch_size=4, parallel=ParallelConfig())
    assert not batches.loader().pin_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert batches.loader().pin_memory


@contextmanager
def reads_of_steps() -> Any:
    """The reads of every training step and every validation step that Lightning takes in this context."""
    found: dict[str, list[Counter[str]]] = {"training_step": [], "validation_step": []}

    def counted(name: str) -> Any:
        method = getattr(base.MegatronModel, name)

        def step(self: Any, *args: Any) -> None:
            with Reads() as reads:
                method(self, *args)
            found[name].append(reads.found)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in found:
            patch.setattr(base.MegatronModel, name, counted(name))
        yield found


KINDS: dict[str, dict[str, Any]] = {
    "policy": dict(kind="policy"),
    "regressor, mean": dict(kind="regressor", pooling="mean"),
    "pairs": dict(kind="regressor", head="ordinal", pairs=4, prepare=lambda model: _with_pairs(model)),
    "generative": dict(kind="regressor", head="generative"),
}


def _with_pairs(model: Any) -> Any:
    from nemo_steerlm.config import LossConfig
    from nemo_steerlm.train.tasks import RegressionTask

    loss = LossConfig(preference="scaled", preference_attribute="quality", smoothing=1.0)
    return RegressionTask(model, (), loss, torch.ones(3), torch.full((model.head.columns,), 0.2))


@pytest.mark.parametrize("name", KINDS)
def test_no_micro_batch_waits_for_the_device(tmp_path: Path, name: str) -> None:
    counts = {}
    for size in (8, 1):
        with reads_of_steps() as found:
            train(output=tmp_path / str(size), init=None, parallel=ParallelConfig(), micro_batch_size=size, steps=2,
                  **KINDS[name])  # fmt: skip
        assert len(found["training_step"]) == len(found["validation_step"]) == 2
        assert not any(found["validation_step"])
        counts[size] = found["training_step"][1]
    # megatron-core asks whether there was any label at all (0.16 to 0.18), and for the norm
    assert counts[1] == counts[8] and counts[1].total() <= 2


def test_the_norm_is_megatron_core_s_own() -> None:
    model = make_model("policy", ParallelConfig())
    model.configure_model()
    model.configure_optimizers()
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(p.shape, generator=generator) * 1e-3 for p in model.chunks[0].parameters()]
    noop = torch.zeros(1, dtype=torch.int)
    expected, _ = local_multi_tensor_applier(local_multi_tensor_l2_norm, noop, [grads], False)
    assert clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm
    with Reads() as reads:
        found, _ = local_multi_tensor_applier(clip_grads.l2_norm_impl, noop, [grads], False)
    assert not reads.found and found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    norm = clip_grads.get_grad_norm_fp32(grads, grad_stats_parallel_group=torch.distributed.group.WORLD)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)


def test_a_library_s_norm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = object()
    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    optim._repair_norm()
    assert clip_grads.l2_norm_impl is theirs


@pytest.mark.parametrize("place", ["utils.local_multi_tensor_l2_norm", "clip_grads.l2_norm_impl"])
def test_another_megatron_core_keeps_its_own_norm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    module, _, name = place.rpartition(".")
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.delattr(clip_grads if module == "clip_grads" else megatron_utils, name)
    with caplog.at_level("INFO"):
        optim._repair_norm()
    assert getattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm) is local_multi_tensor_l2_norm
    assert "gradient norm" in caplog.text


def test_weight_gradients_are_fused_where_a_library_can() -> None:
    model = make_model("policy", ParallelConfig())
    model.build()
    linears = [layer.mlp.linear_fc1 for layer in model.chunks[0].decoder.layers]
    for linear in linears:
        linear.fuse_wgrad_accumulation = False  # as Transformer Engine's have it
    optim.wrap(model.chunks, OptimizerConfig(lr=1e-3))
    assert all(linear.fuse_wgrad_accumulation for linear in linears)
    assert not any(linear.gradient_accumulation_fusion for linear in (*linears, model.chunks[0].output_layer))


@pytest.mark.parametrize(("recipe", "tensor", "multiple"), [(None, 3, 24), ("delayed", 2, 32), ("mxfp8", 4, 128)])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_fit_the_products_of_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool, recipe: str | None, tensor: int, multiple: int
) -> None:
    parallel.initialize()
    config = gpt.transformer_config(ARCHITECTURE, ParallelConfig(), torch.float32)
    config.tensor_model_parallel_size = tensor
    if recipe is not None:
        config.fp8, config.fp8_recipe = "hybrid", recipe
    items = random_items("policy", 8)
    lengths = np.array([len(item["tokens"]) for item in items])
    begun: list[Any] = []
    model: Any = SimpleNamespace(
        chunks=[SimpleNamespace(config=config)], save_pretrained=str, begin=lambda *given, **_: begun.extend(given)
    )
    data: Any = SimpleNamespace(
        item=lambda index, epoch: items[index], lengths=lengths, unit_lengths=lengths, units=None, shares=None
    )
    settings = TrainSftConfig(
        output=str(tmp_path),
        trainer=TrainerConfig(max_steps=1, global_batch_size=8, micro_batch_size=4),
        optimizer=OptimizerConfig(lr=1e-3),
        data=PolicyDataConfig(train="t.jsonl", max_length=200, packing=packing),
    )
    monkeypatch.setattr(fit, "fit", lambda *_: None)
    fit.train(ConditionedSFTTask(model), settings, data, None)
    widths = {batch["tokens"].shape[1] for batch in begun[1][0]}
    assert all(width % multiple == 0 for width in widths) and max(widths) < lengths.sum() + multiple


def test_nothing_is_read_or_generated_in_fp8() -> None:
    with pytest.raises(ConfigError, match="trainer.precision=fp8 is for train-regressor and train-sft"):
        AttributeConditionedGPT.from_pretrained("nowhere", precision="fp8")

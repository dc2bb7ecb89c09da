"""Packed training: no sample sees another, positions restart, and the numbers are those of one sample a row."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.errors import ConfigError
from tests.distributed import run_distributed
from tests.models.helpers import GLOBAL_BATCH, make_model, random_items, train

LENGTHS = [7, 1, 12, 4]


def _attention(heads: int, groups: int, size: int):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_steerlm.megatron.layers import SDPACoreAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=heads * size, num_attention_heads=heads, num_query_groups=groups,
        attention_dropout=0.0,
    )  # fmt: skip
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def _by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax over an explicit mask of equal segment and earlier position."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    place = torch.arange(len(segment), device=query.device)
    seen = (segment[:, None] == segment) & (place[:, None] >= place)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) / math.sqrt(query.shape[3])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)


def _compare(groups: int, device: str, dtype: torch.dtype, tolerance: float) -> None:
    from nemo_steerlm.megatron.layers import Segments

    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), 1, heads, 16) for heads in (4, groups, groups)]
    leaves = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = _attention(4, groups, 16)(*leaves, None, packed_seq_params=Segments(LENGTHS, torch.device(device)))
    query, key, value = exact
    expected = _by_hand(query, key, value, LENGTHS)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_and_its_gradient_stay_within_a_segment(groups: int) -> None:
    _compare(groups, "cpu", torch.float64, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_attention_and_its_gradient_stay_within_a_segment_on_a_gpu(groups: int, dtype, tolerance: float) -> None:
    _compare(groups, "cuda", dtype, tolerance)


def in_one_process(folder: str) -> dict:
    """Outputs of both models for samples alone, packed, and packed beside other samples; what is trained."""
    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.megatron.layers import Segments

    parallel.initialize(ParallelConfig(), seed=1)
    outputs: dict[str, list] = {}
    rng = np.random.default_rng(0)
    samples = [torch.tensor(rng.integers(1, 500, length)) for length in LENGTHS]
    for kind in ("regressor", "policy"):
        model = make_model(kind, ParallelConfig())
        model.build()
        network = model.chunks[0].eval()

        def packed(rows: list[torch.Tensor], network=network) -> list:
            segments = Segments([len(row) for row in rows], torch.device("cpu"))
            out = network(torch.cat(rows)[None], None, None, packed_seq_params=segments)[0]
            return [part.tolist() for part in out.split(segments.lengths)]

        with torch.no_grad():
            outputs[f"{kind} packed"] = packed(samples)
            outputs[f"{kind} alone"] = [network(row[None], None, None)[0].tolist() for row in samples]
            others = [(row + 7) % 500 if i != 2 else row for i, row in enumerate(samples)]
            outputs[f"{kind} beside others"] = packed(others)
    return {**outputs, **_resumed(Path(folder)), "metrics": _train_both_ways(Path(folder))}


def _resumed(folder: Path) -> dict:
    """Metrics of four packed steps, and of the last two after a restart."""
    settings: dict[str, Any] = dict(init=None, parallel=ParallelConfig(), checkpoint_every=2, pack_length=64)
    whole = train("policy", folder / "whole", **settings)
    shutil.copytree(folder / "whole/checkpoints/step-00000002", folder / "again/checkpoints/step-00000002")
    again = train("policy", folder / "again", **settings)
    keys = ("step", "train/loss", "train/grad_norm", "train/pack_efficiency", "val/loss")
    curves = {"whole": whole, "again": again}
    return {name: [{k: row[k] for k in keys if k in row} for row in rows] for name, rows in curves.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run_distributed(in_one_process, 1, folder=str(tmp_path_factory.mktemp("packing")))


@pytest.mark.parametrize("kind", ["regressor", "policy"])
def test_no_sample_sees_another(alone: dict, kind: str) -> None:
    packed, beside = alone[f"{kind} packed"], alone[f"{kind} beside others"]
    for one, two in zip(packed, alone[f"{kind} alone"], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert packed[2] == beside[2]  # to the last bit
    assert packed[0] != beside[0] and packed[3] != beside[3]


def test_positions_restart() -> None:
    from nemo_steerlm.megatron.layers import Segments

    segments = Segments([3, 1, 2], torch.device("cpu"))
    assert segments.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert segments.bounds.tolist() == [0, 3, 4, 6]


def test_a_resumed_run_goes_on_with_the_same_rows(alone: dict) -> None:
    assert [row["step"] for row in alone["whole"] if "train/loss" in row] == [1, 2, 3, 4]
    assert alone["again"] == alone["whole"][-len(alone["again"]) :] and alone["again"][-1]["step"] == 4
    assert all(0.8 < row["train/pack_efficiency"] <= 1 for row in alone["whole"] if "train/loss" in row)


# -- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["regressor", "policy"])
@pytest.mark.parametrize(("ranks", "unit", "equal"), [(1, 1, False), (3, 1, False), (2, 2, True), (1, 4, True)])
def test_ranks_share_the_samples_of_a_step(kind: str, ranks: int, unit: int, equal: bool) -> None:
    from nemo_steerlm.train import batches

    items = random_items(kind, 20)
    lengths = np.array([len(item["tokens"]) for item in items])
    collate = batches.collate_policy if kind == "policy" else partial(batches.collate_regression, outputs=3)

    def share(rank: int) -> list:
        cutting = batches.MicroBatching(
            micro_batch_size=99,
            rank=rank,
            ranks=ranks,
            count_multiple=unit,
            equal_lengths=equal,
            pack_length=50,
            multiple=4,
        )
        plan = batches.once_through(lengths, GLOBAL_BATCH)
        steps = batches.StepBatches(plan, lambda index, _: items[index], lengths, collate, cutting, 3)
        return [steps[step] for step in range(3)]

    shares, seen = [share(rank) for rank in range(ranks)], []
    for step in range(3):
        parts = [share[step] for share in shares]
        counts = {len(part) for part in parts}
        assert len(counts) == 1 and counts.pop() % unit == 0
        widths = {batch["tokens"].shape for part in parts for batch in part}
        assert all(rows == 1 and width % 4 == 0 and width <= 52 for rows, width in widths)
        assert not equal or len(widths) == 1
        for batch in (batch for part in parts for batch in part):
            indices = batch["indices"].tolist()
            seen += indices
            assert sum(batch["segments"]) == batch["tokens"].shape[1] and min(batch["segments"]) > 0
            assert batch["segments"][: len(indices)] == lengths[indices].tolist()
            assert int(batch["real_tokens"]) == lengths[indices].sum() <= 50
            _check_contents(kind, batch, [items[i] for i in indices])
    assert sorted(seen) == list(range(20))


def _check_contents(kind: str, batch: dict, items: list[dict]) -> None:
    tokens = batch["tokens"][0].tolist()
    expected = [int(token) for item in items for token in item["tokens"]]
    assert tokens[: len(expected)] == expected and not any(tokens[len(expected) :])
    if kind == "policy":  # what is predicted: the masked tokens themselves, in order
        expected = [int(t) for item in items for t in item["tokens"][item["loss_mask"]]]
        assert batch["targets"].tolist() == expected
        assert [tokens[place + 1] for place in batch["places"]] == expected
    else:
        assert [tokens[place] for place in batch["last"]] == [int(item["tokens"][-1]) for item in items]
        labels = np.array([item["labels"] for item in items]).reshape(-1, 3)
        np.testing.assert_array_equal(batch["labels"].numpy(), labels)


# -- the verbs --------------------------------------------------------------------------------------------------------


def _train_both_ways(world: Path) -> dict:
    """The two verbs on real conversations, with and without packing; metrics."""
    from nemo_steerlm.verbs import train_regressor, train_sft
    from tests.verbs.helpers import make_world, policy_config, regressor_config

    make_world(world)
    metrics: dict = {}

    def settings(make, name: str, packing: bool):
        config = make(world, name, steps=3)
        plain = dataclasses.replace(config.model.architecture, hidden_dropout=0.0, attention_dropout=0.0)
        config.model.architecture = plain
        config.data.packing, config.data.pack_length = packing, 600
        if packing:
            config.trainer.micro_batch_size = 3  # divides nothing; not read
        return config

    for main, make in ((train_regressor.main, regressor_config), (train_sft.train, policy_config)):
        for packing in (False, True):
            name = f"{make.__name__} {packing}"
            main(settings(make, name, packing))
            rows = (world / name / "metrics.jsonl").read_text().splitlines()
            metrics[name] = [json.loads(row) for row in rows]
    train_regressor.main(settings(regressor_config, "regressor_config False", True))  # goes on, packed now
    config = regressor_config(world, "refused")
    config.data.packing = True
    try:
        train_regressor.main(config)
    except ConfigError as error:
        metrics["refused"] = str(error)
    assert not (world / "refused").exists()
    return metrics


def test_the_verbs_pack_and_nothing_changes(alone: dict) -> None:
    metrics = alone["metrics"]
    for make in ("regressor_config", "policy_config"):
        unpacked, packed = metrics[f"{make} False"], metrics[f"{make} True"]
        for row, reference in zip(packed, unpacked, strict=True):
            for key in reference.keys() - {"train/tokens_per_second", "train/pack_efficiency"}:
                # Correlations of near-constant predictions magnify rounding, and may be near zero themselves.
                differences = "pearson" in key or "information" in key  # of numbers that are near each other
                relative, absolute = (1e-3, 1e-4) if differences else (1e-5, 1e-6)
                assert row[key] == pytest.approx(reference[key], rel=relative, abs=absolute), key
        key = "train/pack_efficiency"
        efficiency = [[row[key] for row in rows if key in row] for rows in (packed, unpacked)]
        assert min(efficiency[0]) > 0.95 and np.mean(efficiency[0]) > np.mean(efficiency[1])
    assert "data.packing=true with attention_dropout=0.1" in metrics["refused"]

"""A checkpoint written with Transformer Engine's layers loads into torch's, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_steerlm.config import Architecture, ParallelConfig
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron import checkpoint, gpt, layers, parallel
from nemo_steerlm.megatron.reductions import sum_over_ranks
from tests.distributed import run_distributed
from tests.models.helpers import NumberTokenizer, make_batches, make_model, random_items

# Together they have every parameter there is: biases of norms and of queries, keys and values, norms of the heads.
OWN: dict[str, dict[str, Any]] = {"nemotron": {"rotary_percent": 0.5}, "qwen2": {}, "qwen3": {"head_dim": 10}}
ARCHITECTURES = {
    family: Architecture(
        family=family, num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
        vocab_size=500, max_position_embeddings=64, **more,
    )
    for family, more in OWN.items()
}  # fmt: skip


class FusedLinear(ColumnParallelLinear):
    """Stands for Transformer Engine's LayerNormLinear where that cannot be: its parameters' names, order and cuts."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = layers.TorchLayerNorm1P if config.layernorm_zero_centered_gamma else layers.TorchRMSNorm
        own = norm(config, input_size, config.layernorm_epsilon)
        later = {name: self._parameters.pop(name) for name in list(self._parameters)}
        for name, parameter in own.named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)
        self._parameters.update(later)
        self._norm = [own]  # a list hides it from torch's registry

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self._norm[0](hidden), *args, **kwargs)

    def get_extra_state(self) -> torch.Tensor:
        """What Transformer Engine 2 says without fp8."""
        return torch.empty(0, dtype=torch.uint8)


def _with_extra_state(norm: type) -> type:
    def set_extra_state(self: Any, state: torch.Tensor) -> None:
        assert state.numel() == 0

    state = {"get_extra_state": FusedLinear.get_extra_state, "set_extra_state": set_extra_state}
    return type(norm.__name__, (norm,), state)


def fused_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The local layers with the names of Transformer Engine's."""
    block = layers.layer_spec(config, vp_stage)
    norm: Any = _with_extra_state(block.layer_norm)  # type: ignore[arg-type]
    for layer in block.layer_specs or []:
        modules = layer.submodules
        modules.input_layernorm = modules.pre_mlp_layernorm = IdentityOp
        modules.sharded_state_dict_keys_map = {}
        attention, mlp = modules.self_attention.submodules, modules.mlp
        feed_forward = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules  # 0.17: partial
        attention.linear_qkv = feed_forward.linear_fc1 = FusedLinear
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
    block.layer_norm = norm
    return block


@contextmanager
def layers_of(kind: str) -> Iterator[None]:
    """Build models with "torch" layers or with "fused" ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "layer_spec", fused_layer_spec if kind == "fused" else layers.layer_spec)
        yield


def stored_names(folder: Path, family: str, kind: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this kind holds."""
    with layers_of(kind):
        chunks = gpt.build(ARCHITECTURES[family], ParallelConfig())
    fused = [name for name, _ in chunks[0].named_parameters() if "layer_norm_" in name]
    assert bool(fused) == (kind == "fused")
    checkpoint.save(folder / kind, checkpoint.model_state(chunks))
    tensors = dist_checkpointing.load_tensors_metadata(str(folder / kind))
    return {name: tensor.global_shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_and_shapes_are_the_same(tmp_path: Path, family: str) -> None:
    parallel.initialize()
    names = stored_names(tmp_path, family, "fused")
    assert names == stored_names(tmp_path, family, "torch")
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in names


def logits(folder: Path, family: str, kind: str, layout: ParallelConfig, write: bool = False) -> torch.Tensor:
    """This rank's logits, of the weights in a model folder (or of random ones, which are written there)."""
    parallel.initialize(layout)
    with layers_of(kind):
        chunks = gpt.build(ARCHITECTURES[family], layout)
    if write:
        for parameter in chunks[0].parameters():  # norms and biases would start alike
            parameter.data += torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter)
        card = model_folder.ModelCard(kind="language_model", architecture=ARCHITECTURES[family])
        model_folder.write(folder, card, NumberTokenizer(), chunks)  # type: ignore[arg-type]
    else:
        model_folder.load_weights(folder, chunks)
    with torch.no_grad():
        return chunks[0].eval()(torch.arange(40).view(2, 20), None, None)


def start(kind: str, family: str, layout: ParallelConfig, distributed: bool) -> Any:
    """A policy ready to train."""
    parallel.initialize(layout, seed=1)
    optimizer = {"lr": 1e-2, "distributed": distributed}
    model = make_model("policy", layout, architecture=ARCHITECTURES[family], optimizer=optimizer)
    with layers_of(kind):
        model.build()
    model.configure_model()
    model.configure_optimizers()
    return model


def sharded_state(model: Any, is_loading: bool = False) -> dict[str, Any]:
    """What a training checkpoint holds (`MegatronStrategy`)."""
    state = checkpoint.model_state(model.chunks)
    optimizer = model.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=checkpoint.metadata())
    return {"model": state, "optimizer": optimizer}


def train_steps(model: Any, first: int, last: int) -> list[list[float]]:
    """Loss and gradient norm of steps `first` to `last`."""
    items = random_items("policy", 20)
    batches = make_batches("policy", items, steps=last, micro_batch_size=2, parallel=model.parallel)
    curve = []
    for step in range(first, last):
        for wrapped in model._wrapped[0]:
            wrapped.zero_grad_buffer()
        model.optimizer.zero_grad()
        kept = model.run(batches[step], forward_only=False)
        total, count = sum_over_ranks(
            sum(float(k["sum"]) for k in kept), sum(float(k["count"]) for k in kept), on_last_stage=True
        )
        curve.append([total / count, float(model.optimizer.step()[1])])
    return curve


def exchange(folder: str) -> dict[str, Any]:
    """In two processes: what one kind of layers wrote, read by the other at TP1 and TP2."""
    root, results = Path(folder), dict[str, Any]()
    layouts = {"tp1": ParallelConfig(), "tp2": ParallelConfig(tensor=2)}
    for writer, reader in (("torch", "fused"), ("fused", "torch")):
        for family in ARCHITECTURES:
            model = root / f"{family}-{writer}"
            expected = {"tp1": logits(model, family, writer, ParallelConfig(), write=True)}
            expected["tp2"] = logits(model, family, writer, layouts["tp2"])
            for name, layout in layouts.items():
                same = torch.equal(logits(model, family, reader, layout), expected[name])
                results[f"{family} {writer} -> {reader} {name}"] = same and expected[name].std().item() > 0.01
    for family, writer, reader, distributed in (
        ("nemotron", "torch", "fused", True),
        ("qwen3", "fused", "torch", True),
        ("qwen3", "torch", "fused", False),
    ):
        path = root / f"training-{family}-{writer}-{distributed}"
        model = start(writer, family, ParallelConfig(), distributed)
        train_steps(model, 0, 2)
        checkpoint.save(path, sharded_state(model))
        curves = {"uninterrupted": train_steps(model, 2, 4)}
        for name, layout in layouts.items():
            model = start(reader, family, layout, distributed)
            loaded = checkpoint.load(path, sharded_state(model, is_loading=True))
            checkpoint.load_model_state(model.chunks, loaded["model"])
            model.optimizer.load_state_dict(loaded["optimizer"])
            curves[name] = train_steps(model, 2, 4)
        results[path.name] = curves
    return results


def test_weights_and_training_state_are_exchanged(tmp_path: Path) -> None:
    results = run_distributed(exchange, 2, folder=str(tmp_path))
    training = {title: curves for title, curves in results.items() if isinstance(curves, dict)}
    assert len(training) == 3 and len(results) == 3 + 12
    assert all(results[title] is True for title in results.keys() - training.keys()), results
    for title, curves in training.items():
        for curve in curves.values():
            for values, expected in zip(curve, curves["uninterrupted"], strict=True):
                assert values == pytest.approx(expected, rel=1e-5), title


@pytest.mark.gpu
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_transformer_engine_loads_what_torch_layers_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    if not layers.transformer_engine_available():
        pytest.skip("Transformer Engine is not installed")
    parallel.initialize()
    monkeypatch.setattr(layers, "transformer_engine_available", lambda: False)
    card = model_folder.ModelCard(kind="language_model", architecture=ARCHITECTURES[family])
    local = gpt.build(card.architecture, ParallelConfig())
    model_folder.write(tmp_path / "model", card, NumberTokenizer(), local)  # type: ignore[arg-type]
    monkeypatch.undo()
    fused = gpt.build(card.architecture, ParallelConfig())
    assert any("layer_norm_weight" in name for name, _ in fused[0].named_parameters())
    model_folder.load_weights(tmp_path / "model", fused)
    model_folder.write(tmp_path / "again", card, NumberTokenizer(), fused)  # type: ignore[arg-type]
    back = gpt.build(card.architecture, ParallelConfig())
    model_folder.load_weights(tmp_path / "again", back)
    tokens = torch.arange(40, device="cuda").view(2, 20)
    with torch.no_grad():
        expected, found, returned = (chunks[0].eval()(tokens, None, None) for chunks in (local, fused, back))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(returned, expected)

"""Layers of our own against what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_steerlm.config import Architecture, ParallelConfig
from nemo_steerlm.megatron import gpt, layers, parallel
from tests.megatron import varlen_kernels


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    from nemo_steerlm.megatron.layers import SwiGLU

    torch.manual_seed(0)
    pair = torch.randn(5, 3, 14, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 3, 7, dtype=dtype)
    exact = pair.detach().double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    found = SwiGLU(None)(pair)  # type: ignore[arg-type]
    (expected * weight.double()).sum().backward()
    (found * weight).sum().backward()
    tolerance: dict[str, Any] = dict.fromkeys(("rtol", "atol"), 1e-12 if dtype == torch.float64 else 2e-2)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(pair.grad.double(), exact.grad, **tolerance)  # type: ignore[union-attr]
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(SwiGLU(None), (pair,))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=2, params_dtype=dtype)
    norm = layers.TorchRMSNorm(config, 48, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * torch.randn(48))
    x = (3 * torch.randn(5, 2, 48)).to(dtype).requires_grad_()
    toward = torch.randn(5, 2, 48).to(dtype)
    exact, weight = (one.detach().double().requires_grad_() for one in (x, norm.weight))
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    (expected * toward.double()).sum().backward()
    found = norm(x)
    (found * toward).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in ((found, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert one is not None and one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(norm, (x,))
    norm.weight.requires_grad_(False)  # under adapters
    again = x.detach().requires_grad_()
    (norm(again) * toward).sum().backward()
    assert torch.equal(again.grad, x.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [4, 2])  # of heads of 8: all of them, or their first half
def test_rotation_turns_complex_numbers(half: int) -> None:
    from nemo_steerlm.megatron.layers import Rotate

    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(5, 1, 1, half, dtype=torch.float64)
    first, second, rest = x.split((half, half, 8 - 2 * half), dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, rest), dim=-1)
    torch.testing.assert_close(Rotate.apply(x, angles.cos(), angles.sin()), expected)
    assert torch.autograd.gradcheck(Rotate.apply, (x, angles.cos(), angles.sin()))


def test_beside_transformer_engine_the_fused_swiglu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel.initialize()
    tokens = torch.arange(24)[None]
    results = []
    for engine in (False, True):
        monkeypatch.setattr(gpt, "transformer_engine_available", lambda engine=engine: engine)
        parallel.seed_everything(1)
        (model,) = gpt.build(Architecture(vocab_size=100), ParallelConfig())
        mlp = model.decoder.layers[0].mlp
        assert mlp.config.bias_activation_fusion == engine
        assert isinstance(mlp.activation_func, layers.SwiGLU) != engine
        with torch.compiler.set_stance("force_eager"):  # what is compiled there, without the compiler
            model(tokens, None, None).logsumexp(-1).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_the_activation_is_fused_where_it_is_gated(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(gpt, "transformer_engine_available", lambda: True)
    config = gpt.transformer_config(Architecture(family=family, vocab_size=100), ParallelConfig(), torch.float32)
    assert config.bias_activation_fusion == (family == "llama") and not config.use_te_activation_func


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kernel", [varlen_kernels.torch_2_11, varlen_kernels.torch_2_12])
def test_packed_training_asks_flash_attention_for_the_same(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable, groups: int
) -> None:
    """Values and gradients, for the kernel's signature of each torch that is allowed."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_steerlm.megatron import layers

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=0.0)
    attention = layers.SDPACoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3)
    segments = layers.Segments([5, 1, 9], torch.device("cpu"))
    torch.manual_seed(0)
    inputs = [torch.randn(15, 1, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, groups, groups)]
    weight = torch.randn(15, 1, 32, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        out = attention(*inputs, None, packed_seq_params=segments)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    expected = run()
    monkeypatch.setattr(layers, "has_flash_attention", lambda _: True)
    monkeypatch.setattr(layers, "_varlen_attention", layers._with_groups(kernel))
    for found, one in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_the_stand_in_has_the_installed_kernels_arguments() -> None:
    """All that is passed to it is a parameter of the same kind there."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    installed = inspect.signature(varlen_attn).parameters
    for kernel in (varlen_kernels.torch_2_11, varlen_kernels.torch_2_12):
        stand_in = inspect.signature(kernel).parameters
        shared = [name for name in stand_in if name in installed]
        assert [installed[name].kind for name in shared] == [stand_in[name].kind for name in shared]
        assert set(stand_in) - set(shared) <= {"enable_gqa"}

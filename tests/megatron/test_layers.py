"""Layers of our own against what they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F


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
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(pair.grad.double(), exact.grad, **tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(SwiGLU(None), (pair,))  # type: ignore[arg-type]


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

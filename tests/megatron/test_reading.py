"""Attention over rows of shared prefixes against the plain formula, text by text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nemo_steerlm.data.prefixes import shared_rows
from tests.megatron import varlen_kernels


def _compare(device: str, dtype: torch.dtype, groups: int, tolerance: float, *, flash: bool) -> None:
    from nemo_steerlm.megatron import inference

    torch.manual_seed(0)
    stem = list(range(150))
    texts = [[*stem, 1], [*stem, *range(200, 300)], [7], [*stem[:90], 999]]
    (row,) = shared_rows(texts, 10**6)
    key, value = (torch.randn(len(row.tokens), 1, groups, 32, dtype=dtype, device=device) for _ in range(2))
    attention = inference._flash_attention if flash else inference._blockwise_attention
    for counts in (row.own, [1] * len(texts), [len(path) for path in row.paths]):
        query = torch.randn(sum(counts), 1, 4, 32, dtype=dtype, device=device)
        found = attention(list(zip(row.paths, counts, strict=True)), 0.3, query)(query, key, value)
        assert found.shape == (sum(counts), 1, 4 * 32)
        expected = [
            _plain(q.double(), key[path].double(), value[path].double())
            for q, path in zip(query.split(counts), map(torch.as_tensor, row.paths), strict=True)
        ]
        torch.testing.assert_close(found.double(), torch.cat(expected), rtol=tolerance, atol=tolerance)


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The last tokens of a text attend to it; all `[tokens, 1, heads, d]`."""
    repeat = query.shape[2] // key.shape[2]
    key, value = (x[:, 0].repeat_interleave(repeat, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], key) * 0.3
    ahead = np.arange(len(key))[None] > np.arange(len(key) - len(query), len(key))[:, None]
    scores.masked_fill_(torch.from_numpy(ahead).to(scores.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)[:, None]


@pytest.mark.parametrize("groups", [4, 2])
def test_a_token_sees_its_own_text(groups: int) -> None:
    _compare("cpu", torch.float64, groups, 1e-12, flash=False)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kernel", [varlen_kernels.torch_2_11, varlen_kernels.torch_2_12])
def test_flash_attention_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch, kernel: Callable, groups: int) -> None:
    from nemo_steerlm.megatron import layers

    monkeypatch.setattr(layers, "_varlen_attention", layers._with_groups(kernel))
    _compare("cpu", torch.float64, groups, 1e-12, flash=True)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(
    ("dtype", "flash", "tolerance"),
    [(torch.float32, False, 1e-4), (torch.bfloat16, False, 2e-2), (torch.bfloat16, True, 2e-2)],
)
def test_a_token_sees_its_own_text_on_a_gpu(groups: int, dtype: torch.dtype, flash: bool, tolerance: float) -> None:
    _compare("cuda", dtype, groups, tolerance, flash=flash)

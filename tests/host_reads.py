"""Count what would make a CPU wait for its GPU, on tensors of a CPU: every way in which values reach Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_OPERATIONS = (
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default,
)  # fmt: skip
_METHODS = ("cpu", "tolist", "numpy")


class HostReads(TorchDispatchMode):
    """Counts inside of its context; `count` is the number so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in _METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += getattr(tensor, "_read", None) is None
            result = method(tensor, *args, **kwargs)
            if isinstance(result, torch.Tensor):
                result._read = True  # type: ignore[attr-defined]  # what is on the host is read from there for nothing
            return result

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        indices = args[1] if func in (_aten.index.Tensor, _aten.index_put_.default) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += func in _OPERATIONS or by_mask
        return func(*args, **(kwargs or {}))

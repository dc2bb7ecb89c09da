"""The dispatch mode: CPU tensors compute, CUDA tensors have a shape and a device only, and what happens is counted."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from nemo_steerlm.fake_gpu import groups
from nemo_steerlm.fake_gpu.memory import Memory

aten = torch.ops.aten
_BOOLEAN = (torch.bool, torch.uint8)
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_PINNING = (aten.pin_memory.default, aten._pin_memory.default)
# A derivative writes into the zeros it has just made, but into a copy of them where a tensor is of a subclass, as fake
# ones are (torch 2.11 to 2.14, csrc/autograd/FunctionsManual.cpp: `index_select_backward`).
_DERIVATIVES = {
    aten.index_add.default: aten.index_add_.default, aten.index_put.default: aten.index_put_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
}  # fmt: skip
# What gives a tensor's values, or some of them: they stay known.
_SAME_VALUES = (
    aten.clone.default, aten.detach.default, aten.alias.default, aten.view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.t.default, aten.transpose.int, aten.slice.Tensor, aten.select.int, aten.expand.default,
    aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default,
)  # fmt: skip
_REMEMBERED = 2**20  # elements of a tensor whose values are kept after it was sent to the device


class _FakeMode(FakeTensorMode):
    avoid_device_init = True  # torch decides by cuda.is_available(), which says yes here


class FakeGpu(TorchDispatchMode):
    """A CUDA device that computes nothing.

    Operations on CUDA tensors run under torch's FakeTensorMode, which knows their rules of shape, type and device.
    What the host reads from the device is the value that was sent there, where it was only sent, viewed and cut, and
    zeros else.

    Attributes:
        size: bytes of the device, for what asks how much is free.
        memory: bytes by part.
        waits: how often the host waited for the device, by place, "train/tasks.py:250 loss": the innermost
            line of this package or megatron-core.
        assumed: places where a mask of unknown values chose rows: all of them.
        sent: bytes given to collectives on CUDA tensors, by operation.
    """

    active: FakeGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.size, self.memory = 80 * 2**30, Memory()
        self.waits: collections.Counter[str] = collections.Counter()
        self.assumed: collections.Counter[str] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()
        self._fake = _FakeMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self._values = WeakTensorKeyDictionary()  # CUDA tensor -> what was sent there, and its storage
        self._written = WeakIdKeyDictionary()  # storages whose values have changed since
        self._special: dict[Any, Callable[..., Any]] = {
            aten._local_scalar_dense.default: lambda tensor: self.read(tensor).item(),
            aten.equal.default: lambda one, two: self.read(one).equal(self.read(two)),
            aten.is_nonzero.default: lambda tensor: bool(self.read(tensor)),
            aten.nonzero.default: lambda mask: self._stacked(self._chosen(mask)),
            aten.masked_select.default: lambda tensor, mask: tensor.expand(mask.shape)[mask],
            aten.repeat_interleave.Tensor: self._repeat_interleave,
        }

    def __enter__(self) -> FakeGpu:
        FakeGpu.active = self
        return super().__enter__()

    def wait(self) -> None:
        """Count that the host waits here."""
        self.waits[_place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = pytree.tree_leaves((args, kwargs))
        fakes = [value for value in flat if isinstance(value, FakeTensor)]
        device = next((value for value in flat if isinstance(value, torch.device)), None)
        if func.namespace == "c10d":
            self._communicate(func, args, fakes)
        if func in _PINNING:  # a CPU build of torch cannot pin memory
            return args[0]
        if not fakes and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if _is_composite(func) and torch.is_inference_mode_enabled():  # not taken apart on the way, as it is elsewhere
            with self:
                return func.decompose(*args, **kwargs)
        if func in self._special:
            with self:
                return self._special[func](*args, **kwargs)
        if func is aten._to_copy.default and device is not None and device.type == "cpu":
            return func(self.read(args[0], waits=not kwargs.get("non_blocking")), **kwargs)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].copy_(self.read(args[1], waits=not (args[2:] and args[2])))
        if func in _DERIVATIVES and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            func = _DERIVATIVES[func]
        if func in _INDEXING:
            args = (args[0], self._indices(func, args), *args[2:])
        if func.namespace == "c10d" and "coalesced" in str(func):  # torch has no rule for these
            return groups.done()
        with self._fake:
            out = func(*args, **kwargs)
        self._remember(func, args, kwargs, fakes, out)
        return out

    # ---------------------------------------------------------------- values

    def read(self, tensor: torch.Tensor, waits: bool = True) -> torch.Tensor:
        """The tensor as the host gets it, for which it waits."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        if waits:
            self.wait()
        known = self._known(tensor)
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if known is None else known

    def _known(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values, unless they were written to, or `tensor.data` was given other ones."""
        values, storage = self._values.get(tensor, (None, 0))
        same = values is not None and values.shape == tensor.shape and storage == tensor.untyped_storage()._cdata
        return values if same and tensor.untyped_storage() not in self._written else None

    def _know(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        self._values[tensor] = (values, tensor.untyped_storage()._cdata)

    def _remember(self, func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor], out: Any) -> None:
        if func._schema.is_mutable and func.namespace != "c10d":  # which leave their tensors as they are
            for tensor in fakes:
                self._written[tensor.untyped_storage()] = True
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self.memory.see(tensor)
        if func is aten._to_copy.default and not fakes and out.numel() <= _REMEMBERED and not args[0].requires_grad:
            self._know(out, args[0].detach().to(out.dtype, copy=True))
        elif func in _SAME_VALUES and (known := self._known(args[0])) is not None:
            for tensor, values in zip(pytree.tree_leaves(out), pytree.tree_leaves(func(known, *args[1:], **kwargs))):
                self._know(tensor, values)

    # ---------------------------------------------------------------- sizes that depend on values

    def _chosen(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """The places that a mask on the device chooses, a tensor a dimension."""
        self.wait()
        known = self._known(mask)
        if known is not None:
            count = int(known.count_nonzero())
        else:
            count = mask.numel()
            self.assumed[f"{_place()}: all of {list(mask.shape)}"] += 1
        return [self._made(lambda: torch.empty(count, dtype=torch.long, device=mask.device)) for _ in mask.shape]

    def _made(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._fake:
            tensor = make()
        self.memory.see(tensor)
        return tensor

    def _stacked(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return self._made(lambda: torch.stack(rows, 1))

    def _repeat_interleave(self, repeats: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
        size = int(self.read(repeats).sum()) if output_size is None else output_size
        return self._made(lambda: torch.empty(size, dtype=torch.long, device=repeats.device))

    def _indices(self, func: Any, args: Any) -> list[torch.Tensor | None]:
        """Indices without masks, after the rules of CUDA that FakeTensorMode does not know."""
        if not isinstance(args[0], FakeTensor):
            raise RuntimeError(f"{func}: a CPU tensor meets indices or values on the device cuda")
        if len(args) > 2 and args[2].device.type == "cpu" and args[2].dim():
            raise RuntimeError(f"{func}: a CUDA tensor meets values on the device cpu")
        if func is not aten.index.Tensor:
            return args[1]  # type: ignore[no-any-return]
        places: list[torch.Tensor | None] = []
        for index in args[1]:
            if index is None or index.dtype not in _BOOLEAN:
                places.append(index)
            else:
                places += self._chosen(index) if isinstance(index, FakeTensor) else index.nonzero(as_tuple=True)
        return places

    # ---------------------------------------------------------------- communication

    def _communicate(self, func: Any, args: Any, fakes: list[FakeTensor]) -> None:
        groups.check(func, args)
        name = str(func).removeprefix("c10d.").removesuffix(".default")
        if fakes:
            self.sent[name] += sum(tensor.numel() * tensor.element_size() for tensor in fakes)


def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(func.namespace != "prim" and func.has_kernel_for_dispatch_key(key))


def _place() -> str:
    """The innermost line of the project, but for this folder, or of megatron-core."""
    frame: Any = sys._getframe(1)
    while frame and not _counts(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


def _counts(file: str) -> bool:
    return "/megatron/core/" in file or ("/nemo_steerlm/" in file and "/fake_gpu/" not in file)

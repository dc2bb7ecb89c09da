"""Run megatron-core where there is no CUDA, so that parallelism can be developed and tested on any machine.

megatron-core asks for ``device="cuda"``, ``torch.cuda.current_device()`` and ``tensor.cuda()`` and compares
``tensor.type()`` with ``'torch.cuda.FloatTensor'``. Without CUDA each of these raises or never matches. `install`
gives them one meaning: *the current "cuda" device is the CPU*. With the gloo backend the unmodified megatron-core
package then runs tensor, sequence, pipeline and data parallelism, the distributed optimizer and distributed
checkpoints.

What a reader must know:

* Where CUDA is available `install` does nothing: a GPU run uses stock torch and stock megatron-core.
* Only calls that would have raised change, except three that quietly answer differently: ``device_count()`` (1),
  ``torch.cuda.manual_seed`` (seeds the CPU generator; stock torch silently does nothing, so that every
  tensor-parallel rank would drop the same units) and ``Tensor.type()``, which tells megatron-core alone the CUDA name.
* Plain wrappers, not a ``TorchFunctionMode``: a mode is thread-local and torch leaves it while ``backward`` runs, so
  hooks, custom backward functions and recomputation would not see it.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_NO_OPERATION = ("synchronize", "empty_cache", "set_device", "current_stream")


def _on_cpu(device: Any) -> Any:
    """Map "cuda", "cuda:N", a CUDA device or a bare index to the CPU; leave every other device alone."""
    is_cuda = device is not None and (isinstance(device, int) or str(device).startswith("cuda"))
    return _CPU if is_cuda else device


def _redirect(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


class _Event:
    """Stand-in for ``torch.cuda.Event``, which megatron-core uses as a stopwatch."""

    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.time - self.time) * 1e3


def _patch_tensor() -> None:
    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if args and isinstance(args[0], (int, str, torch.device)):
            args = (_on_cpu(args[0]), *args[1:])
        return tensor_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = tensor_type(self, *args, **kwargs)
        from_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.")
        return name.replace("torch.", "torch.cuda.", 1) if from_megatron and isinstance(name, str) else name

    torch.Tensor.to, torch.Tensor.type = to, type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]


def _patch_torch() -> None:
    from torch.utils._device import _device_constructors

    _device_constructors()  # a cached set of torch's own factories, used by `with torch.device(...)`: fill it first
    for name in _FACTORIES:
        setattr(torch, name, _redirect(getattr(torch, name)))
    _patch_tensor()

    cuda: Any = torch.cuda
    cuda.current_device, cuda.device_count = lambda: _CPU, lambda: 1
    cuda.is_available = lambda: False  # under Lightning a CUDA build would ask device_count() instead
    for name in _NO_OPERATION:
        if hasattr(cuda, name):
            setattr(cuda, name, lambda *_, **__: None)  # one object a name: dynamo's tables key on identity
    cuda.Event = _Event
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)


def install() -> bool:
    """Give "cuda" the meaning of the CPU in this process; idempotent.

    Returns:
        False, with nothing changed, when CUDA is available; True when the CPU backend is active.
    """
    if torch.cuda.is_available():
        return False
    if torch.cuda.Event is _Event:
        return True
    # Import first: decorators of megatron-core load torch._dynamo, which must see torch's own functions.
    from megatron.core.tensor_parallel import random as megatron_random

    _patch_torch()
    # The stock setter queues a callback until CUDA is initialised, that is for ever. With it replaced the stock random
    # streams work; megatron-core warns that the CPU generator moved, which here is what it should do.
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())
    return True

"""Run megatron-core where there is no CUDA, so that parallelism can be developed and tested on any machine.

megatron-core asks for ``device="cuda"``, ``torch.cuda.current_device()`` and ``tensor.cuda()`` and compares
``tensor.type()`` with ``'torch.cuda.FloatTensor'``. Without CUDA each of these raises or never matches. `install`
gives them one meaning: *the current "cuda" device is the CPU*. With the gloo backend the unmodified megatron-core
package then runs tensor, sequence, pipeline and data parallelism, the distributed optimizer and distributed
checkpoints.

Notes:

* Where CUDA is available `install` does nothing: a GPU run uses stock torch and stock megatron-core.
* Only calls that would have raised change, except three that silently return other values: ``device_count()`` (1),
  ``torch.cuda.manual_seed`` (seeds the CPU generator; stock torch silently does nothing, so that every
  tensor-parallel rank would drop the same units) and ``Tensor.type()``, which tells megatron-core alone the CUDA name.
* Collectives in a group of one process run in the calling thread; their results are the same.
* Transformer Engine and apex cannot be imported: megatron-core would use their CUDA kernels on the CPU's tensors.
* Plain wrappers, not a ``TorchFunctionMode``: a mode is thread-local and torch leaves it while ``backward`` runs, so
  hooks, custom backward functions and recomputation would not see it.

Tried with torch 2.11 to 2.14 and megatron-core 0.16.1 to 0.19.2. Remove when megatron-core takes its device as an
argument.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from nemo_steerlm.megatron import patches

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_IN_PLACE = ("all_reduce", "broadcast")
_COPYING = ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")  # (target, source, ...)
_ARGUMENTS = {  # of the collectives, in all versions tried; an unknown one may need work in a group of one too
    "tensor", "tensor_list", "output", "output_tensor", "input", "input_tensor", "op", "src", "group", "group_src",
    "async_op",
}  # fmt: skip
_CUDA_ONLY = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
_NO_OPERATION = ("synchronize", "empty_cache", "set_device", "current_stream")
_GLOO = "torch.distributed.distributed_c10d.ProcessGroupGloo"
_SECONDS_BETWEEN = 30.0  # returns of memory: allocating it again costs page faults
_GLOO_EFFECT = "each process group on a CPU has a device and threads of its own, which is slower"


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

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, *_: Any, **__: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self, *_: Any, **__: Any) -> None:
        pass

    def elapsed_time(self, end: _Event, *_: Any, **__: Any) -> float:
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
    try:
        from torch.utils._device import _device_constructors

        _device_constructors()  # a cached set, for `with torch.device(...)`: fill it with torch's own functions
    except (ImportError, TypeError) as error:
        patches.leave("torch.utils._device", error, "`with torch.device(...)` may miss torch's factories")
    for name in _FACTORIES:
        setattr(torch, name, _redirect(getattr(torch, name)))
    _patch_tensor()

    cuda: Any = torch.cuda
    cuda.current_device, cuda.device_count = lambda *_, **__: _CPU, lambda *_, **__: 1
    cuda.is_available = lambda *_, **__: False  # under Lightning a CUDA build would ask device_count() instead
    for name in _NO_OPERATION:
        if hasattr(cuda, name):
            setattr(cuda, name, lambda *_, **__: None)  # one object a name: dynamo's tables key on identity
    cuda.Event = _Event
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.manual_seed = cuda.random.manual_seed = _manual_seed


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int, *_: Any, **__: Any) -> None:
    torch.default_generator.manual_seed(seed)


def _unless_alone(function: Callable) -> Callable:
    """A collective that sends nothing in a group of one: it copies its input to the target, if it has one.

    gloo copies in its own threads, each with its own OpenMP threads in addition to the model's. OpenMP then counts
    more threads than processors and lets all of them sleep instead of spinning for a microsecond
    (`python -m benchmarks.profile_step` counts the sleeps). Remove when torch's gloo does nothing in a group of one.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("async_op") or not given.keys() <= _ARGUMENTS:
            return function(*args, **kwargs)
        if dist.get_world_size(given.get("group")) != 1:  # -1 outside of the group
            return function(*args, **kwargs)
        if function.__name__ in _COPYING:
            target, source, *_ = given.values()
            target = target[0] if isinstance(target, list) else target
            if target.data_ptr() != source.data_ptr():
                target.copy_(source)
        return None

    return wrapper


def _patch_distributed() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in (*_IN_PLACE, *_COPYING):
        setattr(dist, name, _unless_alone(getattr(dist, name)))
    patches.replace(
        buffers,
        "a data-parallel group of one process works in threads of its own, which is slower on a CPU",
        dist_all_gather_func=dist.all_gather_into_tensor,
        dist_reduce_scatter_func=dist.reduce_scatter_tensor,
    )


@contextlib.contextmanager
def one_gloo_device() -> Iterator[None]:
    """Inside, new gloo process groups share one device, and have one worker thread each.

    torch (2.11 to 2.14, distributed_c10d: `ProcessGroupGloo`) gives every group its own device, whose thread wakes a
    hundred times a second, and two worker threads; megatron-core makes some twenty groups. Remove when
    `init_process_group` takes a device.
    """
    gloo: Any = distributed_c10d.ProcessGroupGloo
    names = os.environ.get("GLOO_SOCKET_IFNAME")  # as torch reads it
    try:
        devices = (
            [gloo.create_device(interface=n) for n in names.split(",")] if names else [gloo.create_default_device()]
        )
    except (AttributeError, TypeError) as error:
        patches.leave(_GLOO, error, _GLOO_EFFECT)
        yield
        return

    def with_devices(timeout: timedelta, **settings: Any) -> Any:
        options = gloo._Options()
        options._devices, options._threads, options._timeout = devices, 1, timeout
        for name, value in settings.items():  # torch 2.14: enable_reconfigure
            setattr(options, name, value)
        return options

    class OneDevice(gloo):
        def __init__(self, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(store, rank, size, with_devices(*args, **kwargs))
            except (AttributeError, TypeError) as error:
                patches.leave(_GLOO, error, _GLOO_EFFECT)
                super().__init__(store, rank, size, *args, **kwargs)

    distributed_c10d.ProcessGroupGloo = OneDevice  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = gloo  # type: ignore[misc]


class MemoryReturn:
    """Returns freed memory to the system, which glibc keeps: tensors of changing sizes fragment it.

    Without it a process that trains 135M parameters on rows of changing length grows by gigabytes.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()
        try:
            self._trim: Callable[[int], int] | None = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError):  # not glibc
            self._trim = None

    def __call__(self) -> None:
        """Return it, once in some seconds at most; nothing where CUDA is available."""
        if self._trim is None or torch.cuda.is_available() or time.monotonic() - self._last < _SECONDS_BETWEEN:
            return
        self._trim(0)
        self._last = time.monotonic()


def install() -> bool:
    """Give "cuda" the meaning of the CPU in this process; idempotent.

    Returns:
        False, with nothing changed, when CUDA is available; True when the CPU backend is active.
    """
    if torch.cuda.is_available():
        return False
    if torch.cuda.Event is _Event:
        return True
    for name in _CUDA_ONLY:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it then raises ImportError
    # Import first: what megatron-core takes from torch while it loads is then torch's own, as on a GPU.
    from megatron.core.tensor_parallel import random as megatron_random

    _patch_torch()
    _patch_distributed()
    # The stock setter (megatron-core 0.16.1 to 0.19.2, tensor_parallel/random.py, line 72 of 0.16.1) queues a callback
    # until CUDA is initialised, which never happens. With it replaced the stock random streams work; megatron-core
    # warns that the CPU generator moved, which is intended here.
    patches.replace(
        megatron_random,
        "dropout on a CPU may draw the same units on every tensor-parallel rank",
        _set_cuda_rng_state=_set_rng_state,
    )
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())
    return True

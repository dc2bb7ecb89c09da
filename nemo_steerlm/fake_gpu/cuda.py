"""torch.cuda's answers where there is no CUDA, and kernels that torch chooses in C++ by asking a real GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from nemo_steerlm.fake_gpu.mode import FakeGpu

aten = torch.ops.aten
_PROPERTIES = SimpleNamespace(
    name="Fake H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
)  # fmt: skip


class _Stream:
    """A stream, or an event in one: nothing is ever under way."""

    cuda_stream, device = 0, torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        _gpu().wait()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None  # wait_stream, record_event, ...


class _Generator:
    """The device's random state, which nothing draws from."""

    def get_state(self) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        assert state.dtype == torch.uint8 and state.device.type == "cpu"


def _gpu() -> FakeGpu:
    assert FakeGpu.active is not None
    return FakeGpu.active


def _used() -> int:
    return sum(_gpu().memory.now.values())


def install() -> None:
    """Make torch say that there is one H100; to be called before anything else asks."""
    cuda: Any = torch.cuda
    generator, stream = _Generator(), _Stream()
    answers: dict[str, Any] = dict(
        is_available=True, is_initialized=True, _is_in_bad_fork=False, device_count=1, current_device=0,
        get_device_capability=(9, 0), get_device_name=_PROPERTIES.name, get_device_properties=_PROPERTIES,
        is_bf16_supported=True, current_stream=stream, default_stream=stream, is_current_stream_capturing=False,
        memory_stats={}, _lazy_init=None, set_device=None, empty_cache=None, manual_seed=None, manual_seed_all=None,
        reset_peak_memory_stats=None,
    )  # fmt: skip
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, __value=value, **___: __value)
    cuda.synchronize = lambda *_, **__: _gpu().wait()
    cuda.memory_allocated = cuda.memory_reserved = lambda *_, **__: _used()
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_, **__: _gpu().memory.peak
    cuda.mem_get_info = lambda *_, **__: (_gpu().size - _used(), _gpu().size)
    cuda.get_rng_state = lambda *_, **__: generator.get_state()
    cuda.set_rng_state = lambda state, *_, **__: generator.set_state(state)
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        setattr(cuda.random, name, getattr(cuda, name))
    cuda.default_generators = (generator,)
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.nccl.version = lambda: (2, 28, 0)  # torch's checkpoints log it
    _patch_construction()
    F.scaled_dot_product_attention = _attention_of(F.scaled_dot_product_attention)  # type: ignore[assignment]
    F.rms_norm = _rms_norm_of(F.rms_norm)


def _patch_construction() -> None:
    """`torch.tensor(..., device="cuda")` makes a CPU tensor and copies it, where a mode can see it; modules move."""
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    make = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, (list, tuple)):  # torch would read tensors in it without asking a mode
            data = pytree.tree_map_only(FakeTensor, lambda value: value.item(), data)
        return make(data, *args, **kwargs)

    torch.tensor = tensor
    fake: Any = FakeTensor
    fake.tolist = lambda self: _gpu().read(self).tolist()  # one copy, where torch asks for every number
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]


def _apply(module: Any, function: Any, recurse: bool = True) -> Any:
    """`Module.to` and its kin; torch's own swaps a parameter for its fake, and refuses where others refer to it."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for table in (module._parameters, module._buffers):
        for name, old in [(name, old) for name, old in table.items() if old is not None]:
            with torch.no_grad():
                new = function(old.detach())
            if isinstance(new, FakeTensor) == isinstance(old, FakeTensor):
                old.data = new
                continue
            table[name] = torch.nn.Parameter(new, old.requires_grad) if table is module._parameters else new
            table[name].__dict__.update(old.__dict__)
    return module


def _attention_of(real: Any) -> Any:
    """SDPA with the kernel that an H100 takes: flash attention in half precision without a mask."""

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if not query.is_cuda:
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is None and query.dtype != torch.float32:  # it reads groups itself
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        efficient, grad = aten._scaled_dot_product_efficient_attention, query.requires_grad
        return efficient(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]

    return attention


class _FusedRMSNorm(torch.autograd.Function):
    """One kernel; a CPU build of torch takes it apart and keeps fp32 copies that a GPU never has."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert x.device == weight.device and x.shape[-1:] == weight.shape
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm_of(real: Any) -> Any:
    def rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
        return _FusedRMSNorm.apply(x, weight) if x.is_cuda else real(x, shape, weight, eps)

    return rms_norm

"""RMSNorm on one thread of a CPU beside torch's: `python -m benchmarks.norm`."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from nemo_steerlm.megatron.layers import TorchRMSNorm
from nemo_steerlm.report.tables import text_table

SHAPE = (740, 1, 576)  # [seq, batch, hidden]
CALLS, TURNS = 60, 5


def main() -> None:
    """Take the two in turn; the median of a call's CPU time, and the bytes kept for the backward pass."""
    torch.set_num_threads(1)
    cells = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        config = TransformerConfig(num_layers=1, hidden_size=SHAPE[-1], num_attention_heads=9, params_dtype=dtype)
        norm = TorchRMSNorm(config, SHAPE[-1])
        ways = {
            "torch": lambda x, norm=norm: F.rms_norm(x, (SHAPE[-1],), norm.weight, norm.eps),
            "ours": norm,
        }
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(TURNS):
            for way, call in ways.items():
                times[way].append(_milliseconds(call, dtype))
        for way, call in ways.items():
            forward, backward = (median(one) for one in zip(*times[way], strict=True))
            cells.append([name, way, f"{forward:.2f}", f"{backward:.2f}", f"{_kept(call, dtype) / 1e6:.2f}"])
    print(text_table(cells, ["", "", "forward, ms", "backward, ms", "kept, MB"]))


def _milliseconds(call: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """CPU time of one forward and one backward pass."""
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    grad = torch.randn(SHAPE, dtype=dtype)
    clock = [time.process_time()]
    found = [call(x) for _ in range(CALLS)]
    clock.append(time.process_time())
    for one in found:
        one.backward(grad)
    clock.append(time.process_time())
    return (clock[1] - clock[0]) * 1e3 / CALLS, (clock[2] - clock[1]) * 1e3 / CALLS


def _kept(call: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes of the tensors that a forward pass saves."""
    sizes: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        call(torch.randn(SHAPE, dtype=dtype, requires_grad=True))
    return sum(sizes.values())


if __name__ == "__main__":
    main()

"""What the CPU backend changes of torch.distributed, against torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import run_distributed


def check_groups() -> dict[str, list]:
    """Collectives in a group of one and of two, patched and torch's own; the names of the threads."""
    from nemo_steerlm.megatron import cpu, parallel

    parallel.initialize()
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    pairs = []
    for group in (alone, dist.group.WORLD):
        for name in (*cpu._IN_PLACE, *cpu._COPYING):
            patched = getattr(dist, name)
            pairs.append([_collect(function, name, group) for function in (patched, patched.__wrapped__)])
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return {"pairs": pairs, "threads": threads}


def _collect(function: Any, name: str, group: Any) -> list[float]:
    mine, size = torch.arange(4.0) + 10 * dist.get_rank(), group.size()
    if name == "all_gather":
        gathered = [torch.zeros(4) for _ in range(size)]
        function(gathered, mine, group)
        return torch.cat(gathered).tolist()
    if name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        target = torch.zeros(4 * size if name == "all_gather_into_tensor" else 4 // size)
        function(target, mine, group=group)
        return target.tolist()
    function(mine, **({"group_src": 0} if name == "broadcast" else {}), group=group)
    return mine.tolist()


def test_a_group_of_one_copies_and_one_device_serves_all_groups() -> None:
    found = run_distributed(check_groups, 2)
    for patched, own in found["pairs"]:
        assert patched == own
        assert any(patched)
    # The test's own two groups have devices of their own, all of megatron-core's share one with the world's.
    assert sum(name.startswith("gloo_tcp_loop") for name in found["threads"]) <= 3

"""What the CPU backend changes of torch.distributed, against torch's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_steerlm.megatron import cpu
from tests.distributed import run_distributed


def check_groups() -> dict[str, list]:
    """Collectives in a group of one and of two, patched and torch's own; the names of the threads."""
    from nemo_steerlm.megatron import parallel

    parallel.initialize()
    groups = [dist.new_group([rank]) for rank in range(2)]
    alone, foreign = groups[dist.get_rank()], groups[1 - dist.get_rank()]
    pairs = []
    for group in (alone, dist.group.WORLD):
        for name in (*cpu._IN_PLACE, *cpu._COPYING):
            patched = getattr(dist, name)
            pairs.append([_collect(function, name, group) for function in (patched, patched.__wrapped__)])
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    untouched = torch.zeros(4)
    dist.all_gather_into_tensor(untouched, torch.ones(4), group=foreign)
    return {"pairs": pairs, "threads": threads, "untouched": untouched.tolist()}


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
    assert found["untouched"] == [0.0] * 4  # by a group this process is no part of
    # All of megatron-core's groups share a device with the world's; the test's own group has another.
    assert sum(name.startswith("gloo_tcp_loop") for name in found["threads"]) == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_freed_memory_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    give_back = cpu.MemoryReturn()
    blocks: list[torch.Tensor | None] = [torch.ones(25_000) for _ in range(2000)]  # 100 kB each: no mapping of its own
    blocks[::2] = [None] * 1000  # holes between what stays
    held = resident()
    give_back()
    assert resident() > held - 20e6, "only once in a while"
    monkeypatch.setattr(give_back, "_last", -1e9)
    give_back()
    assert resident() < held - 80e6

"""The launcher of the distributed tests itself."""

from __future__ import annotations

import os
import time

import pytest

from tests.distributed import run_distributed


def add_ranks(offset: int) -> dict[str, int]:
    import torch
    import torch.distributed as dist

    from nemo_steerlm.megatron import parallel

    parallel.initialize()
    total = torch.tensor(int(os.environ["RANK"]) + offset)
    dist.all_reduce(total)
    return {"total": total.item(), "threads": torch.get_num_threads()}


def fail_on_rank_one(wait: bool) -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the reason")
    time.sleep(60 if wait else 0)


def test_result_of_rank_zero() -> None:
    assert run_distributed(add_ranks, 3, offset=10) == {"total": 33, "threads": 1}


def test_failing_rank_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 exited with 1.*the reason"):
        run_distributed("tests.test_distributed:fail_on_rank_one", 2, wait=True)


def test_time_limit_shows_stacks() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[0\] still ran after 2 s.*fail_on_rank_one"):
        run_distributed(fail_on_rank_one, 1, timeout=2, wait=True)

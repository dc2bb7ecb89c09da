"""The launcher of the distributed tests itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_distributed


def add_ranks(offset: int) -> dict:
    import torch
    import torch.distributed as dist

    from nemo_steerlm.megatron import parallel

    parallel.initialize()
    total = torch.tensor(int(os.environ["RANK"]) + offset)
    dist.all_reduce(total)
    gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    return {"total": total.item(), "threads": torch.get_num_threads(), "gpus": gpus}


def fail_on_rank_one(wait: bool) -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the reason")
    time.sleep(60 if wait else 0)


def test_result_of_rank_zero() -> None:
    assert run_distributed(add_ranks, 3, offset=10) == {"total": 33, "threads": 1, "gpus": ""}


ONE_OF_EACH = """
import os
import pytest

def test_of_all():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

@pytest.mark.gpu
def test_of_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
"""


@pytest.mark.parametrize(("asked", "run"), [("", "test_of_all PASSED"), ("1", "test_of_gpus PASSED")])
def test_gpus_are_hidden_unless_asked_for(tmp_path: Path, asked: str, run: str) -> None:
    """A machine with GPUs runs the whole suite without them, and what needs one when told."""
    (tmp_path / "test_both.py").write_text(ONE_OF_EACH)
    pytest_ = [sys.executable, "-m", "pytest", "-v", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    found = subprocess.run(
        [*pytest_, "-n0", "-p", "no:cacheprovider", str(tmp_path / "test_both.py")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "2,3", "STEERLM_TEST_GPU": asked},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and run in found.stdout and "1 passed, 1 skipped" in found.stdout, found.stdout


def test_failing_rank_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 exited with 1.*the reason"):
        run_distributed("tests.test_distributed:fail_on_rank_one", 2, wait=True)


def test_time_limit_shows_stacks() -> None:
    with pytest.raises(AssertionError, match=r"(?s)ranks \[0\] still ran after 2 s.*fail_on_rank_one"):
        run_distributed(fail_on_rank_one, 1, timeout=2, wait=True)

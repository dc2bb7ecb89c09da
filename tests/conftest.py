"""What every test shares: one thread a process, no settings of the caller's own run, the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: the distributed tests start more processes than there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR", "SLURM_STEP_NUM_TASKS"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; the test is skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("STEERLM_REAL_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set STEERLM_REAL_DATA)")
    return folder

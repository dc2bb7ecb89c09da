"""What every test shares: one thread a process, and no settings of the caller's own run."""

from __future__ import annotations

import os

# Before torch is imported anywhere: the distributed tests start more processes than there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR", "SLURM_STEP_NUM_TASKS"):
    os.environ.pop(_name, None)

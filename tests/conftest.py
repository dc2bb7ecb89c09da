"""What every test shares: one thread a process, no GPU unless asked for, no settings of the caller's own run."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

# Before torch is imported anywhere: the distributed tests start more processes than there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_HUB_OFFLINE"] = "1"  # a stand-in of the hub is asked where a test starts one: hub_server.py
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "HYDRA_FULL_ERROR", "SLURM_STEP_NUM_TASKS"):
    os.environ.pop(_name, None)
# A machine's GPUs are hidden: the tests start more ranks than it has. `make test-gpu` runs those that need one.
ON_GPU = os.environ.get("STEERLM_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Under pytest-xdist: long files first, one file on one worker, because its tests share what was costly to make; files
# that share it with each other name a group of their own.
_LONG_FIRST = (
    "test_readme", "test_quickstart", "test_kill", "test_layouts", "test_steering", "test_lora", "test_evaluate",
    "test_logs", "test_objective", "test_multirun",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)  # before xdist's own hook, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Order and group the tests; those of the README have nothing in common and stand alone."""
    for item in items:
        name = item.path.stem
        if (item.get_closest_marker("gpu") is not None) != ON_GPU:
            item.add_marker(pytest.mark.skip(reason=f"for runs {'without' if ON_GPU else 'with'} STEERLM_TEST_GPU=1"))
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.name if name == "test_readme" else str(item.path)))
    items.sort(key=lambda item: _LONG_FIRST.index(item.path.stem) if item.path.stem in _LONG_FIRST else 99)
    return (yield)

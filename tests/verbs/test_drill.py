"""The short form of `make drill`: a few restarts of the run with the most parts."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import run_distributed


def drill_shortly(folder: str) -> dict:
    """Two data-parallel ranks whose checkpoints go to a local disk first."""
    from tests import drill

    drill.import_verbs()
    drill.prepare(Path(folder))
    return drill.drill(Path(folder), "policy, LoRA, local disk", restarts=4, seed=0)


def test_a_run_that_is_restarted_at_random_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    row = run_distributed(drill_shortly, 1, folder=str(tmp_path), timeout=600)
    assert row["equal"] and row["SIGTERM"] + row["SIGUSR1"] + row["SIGKILL"] == 4

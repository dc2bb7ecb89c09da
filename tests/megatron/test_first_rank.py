"""What one process of a job does for all of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.distributed import ROOT, run_distributed


def hash_on_two(folder: str) -> list:
    """A model folder's fingerprint on two ranks, and of a folder that only the error knows."""
    import torch.distributed as dist

    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.provenance import fingerprint_folder

    parallel.initialize()
    calls = []

    def digest(name: str) -> str:
        calls.append(name)
        return fingerprint_folder(Path(folder) / name)

    found: list = [parallel.on_rank_zero(lambda: digest("model"))]
    try:
        parallel.on_rank_zero(lambda: digest("nowhere"))
    except OSError as error:
        found.append(str(error))
    everywhere: list = [None, None]
    dist.all_gather_object(everywhere, [*found, len(calls)])
    return everywhere


def test_one_rank_hashes_a_folder_and_tells_the_others(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"weights")
    zero, one = run_distributed(hash_on_two, 2, folder=str(tmp_path))
    assert zero[:2] == one[:2] and len(zero[0]) == 64 and "nowhere" in zero[1]
    assert (zero[2], one[2]) == (2, 0)


@pytest.mark.parametrize("step", ["annotate", "convert", "generate", "sample", "train_regressor", "train_sft"])
def test_no_step_hashes_on_every_rank(step: str) -> None:
    """A step runs on all ranks: there a hash is asked of rank 0. (What the other verbs write, rank 0 writes alone.)"""
    file = ROOT / f"nemo_steerlm/verbs/{step}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    inside = {id(n) for call in calls if "on_rank_zero" in ast.unparse(call.func) for n in ast.walk(call)}
    loose = [c for c in calls if ast.unparse(c.func) in ("fingerprint_folder", "sha256_file") and id(c) not in inside]
    assert not loose, f"{file.name}:{loose[0].lineno}: {ast.unparse(loose[0])}"

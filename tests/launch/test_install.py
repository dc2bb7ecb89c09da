"""What pip would do to NVIDIA's images, whose packages are installed in name only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python312() -> str:
    """An interpreter as the images have it, that reaches the package index."""
    asked = subprocess.run(["make", "-s", "print-python312"], cwd=ROOT, capture_output=True, text=True)
    python = asked.stdout.strip()
    if not python:
        pytest.skip("no Python 3.12 here")
    probe = [python, "-m", "pip", "--quiet", "--timeout", "5", "--retries", "0", "index", "versions", "StrEnum"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no package index here")
    return python


@pytest.mark.skipif(shutil.which("make") is None, reason="make names the Python 3.12 of this machine")
def test_pip_keeps_an_images_torch_transformer_engine_apex_and_megatron_core(python312: str, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it is in the extra 'test'")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    images = sorted((ROOT / "docker").glob("nemo-*.txt"))
    tool: list[str | Path] = [python312, ROOT / "tools" / "resolve_in_image", next(tmp_path.glob("*.whl")), *images]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for torch in ("torch 2.11.0a0+eb65b36914.nv26.02", "torch 2.12.0a0+0291f960b6"):
        assert torch in done.stdout

"""Two jobs on one output: the second is refused, a dead owner is no owner, shares go together."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.ownership import owned
from tests.distributed import ROOT


def _holder(output: Path, share: str | None = None) -> subprocess.Popen:
    """Another process that owns `output` until it is killed."""
    code = f"""
        import time
        from nemo_steerlm.ownership import owned
        with owned({str(output)!r}, {share!r}):
            print("mine", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    return process


def test_the_second_job_is_refused_and_a_dead_owner_taken_over(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    other = _holder(output)
    try:
        with pytest.raises(ConfigError, match=f"run: in use by process {other.pid} on "), owned(output):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with owned(output):
        pass
    assert list(output.parent.iterdir()) == []


def test_shares_of_one_output_go_together(tmp_path: Path) -> None:
    output = tmp_path / "labelled.jsonl"
    with owned(output, "0/2"):
        with owned(output, "1/2"), pytest.raises(ConfigError, match="in use"), owned(output):
            pass
        with pytest.raises(ConfigError, match="in use"), owned(output, "0/2"):
            pass
    with owned(output), pytest.raises(ConfigError, match="in use"), owned(output, "0/2"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_flock_the_file_names_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    output = tmp_path / "run"
    lock = tmp_path / ".run.lock"
    with owned(output):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match="in use"), owned(output):
            pass
    mine = {"host": os.uname().nodename, "pid": os.getpid(), "started": time.time() - 10**6}
    lock.write_text(json.dumps(mine))  # another process had this number once
    with owned(output):
        pass
    lock.write_text(json.dumps({**mine, "host": "elsewhere"}))
    with pytest.raises(ConfigError, match="on elsewhere"), owned(output):
        pass


def test_an_error_leaves_nothing_half_written(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(KeyError), owned(output):
        for folder in (output / "checkpoints/step-00000002.unfinished", tmp_path / "run.unfinished"):
            folder.mkdir(parents=True)
        (output / "checkpoints/step-00000001").mkdir()
        raise KeyError
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "run", "run/checkpoints", "run/checkpoints/step-00000001",
    ]  # fmt: skip


def test_a_place_that_cannot_be_written_is_told_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.*/file/run: cannot be written: .*choose another place"):
        with owned(tmp_path / "file" / "run"):
            pass

"""A job in parts that is resumed tells how long the rest takes, by what it does itself."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

from tests.distributed import run_distributed


def resume(folder: str) -> str:
    """A job of ten rows whose first eight an earlier run did; what it says."""
    from nemo_steerlm import progress
    from nemo_steerlm.conversation import Conversation, Turn
    from nemo_steerlm.megatron import jobs, parallel

    parallel.initialize()
    now = 0.0
    progress.INTERVAL = 0.0  # a line for each part
    jobs.Progress = functools.partial(progress.Progress, clock=lambda: now)  # type: ignore[attr-defined, assignment, misc]
    rows = [Conversation([Turn("User", "hi")], id=str(number)) for number in range(10)]

    def work(index: int, part: list[Conversation], bar: Any) -> list[dict[str, Any]]:
        nonlocal now
        now += 60.0
        if index == stop:
            raise KeyboardInterrupt
        return [row.to_record() for row in part]

    stop = 8
    settings: Any = dict(output=Path(folder) / "out.jsonl", job={}, part_size=1, total=10, unit="rows")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(KeyboardInterrupt):
        jobs.run_in_parts(rows, work, **settings)
    stop = -1
    with contextlib.redirect_stderr(io.StringIO()) as said:
        jobs.run_in_parts(rows, work, **settings)
    return said.getvalue()


def test_what_an_earlier_run_did_is_no_speed_of_this_one(tmp_path: Path) -> None:
    lines = run_distributed(resume, 1, folder=str(tmp_path)).splitlines()
    assert lines == ["out.jsonl: rows 9 of 10, 01:00 left", "out.jsonl: rows 10 of 10, took 02:00"]

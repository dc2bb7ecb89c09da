"""The process of `room.Room`: torch is made to believe in a GPU, and every job is a fork of it."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def _serve() -> None:
    """Fork a process for each line of stdin, and say on stdout how it ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    from nemo_steerlm.fake_gpu import cuda, groups, guard

    guard.load()
    cuda.install()
    groups.install()
    import nemo_steerlm.train.fit  # noqa: F401  (imported once, for all)
    from nemo_steerlm.fake_gpu import parts

    groups.write_alone()
    parts.install()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_run(json.loads(line)))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()
    os._exit(0)  # nothing to clean up


def _run(job: dict[str, Any]) -> int:
    """The call itself; its output goes to a file, its stack too when time is up."""
    folder = Path(job["folder"])
    with open(folder / "stderr", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(job["timeout"], exit=True, file=2)  # type: ignore[arg-type]
    os.environ.update(job["env"])
    from nemo_steerlm.fake_gpu.mode import FakeGpu

    try:
        with FakeGpu() as gpu:
            module, function = job["target"].split(":")
            result = getattr(importlib.import_module(module), function)(gpu, **job["kwargs"])
        (folder / "result.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


if __name__ == "__main__":
    _serve()

"""Resident memory of a command: `python -m benchmarks.resident steerlm train-sft ...`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

SECONDS = 0.05  # between two looks


def main() -> None:
    """Run the words as a command; tell its largest resident memory and that of its last second. Linux only."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    process, found = subprocess.Popen(sys.argv[1:]), [0.0]
    while process.poll() is None:
        found.append(_gigabytes(process.pid))
        time.sleep(SECONDS)
    last = max(found[-round(1 / SECONDS) :])
    print(f"largest {max(found):.2f} GB, in the last second {last:.2f} GB, exit code {process.returncode}")


def _gigabytes(pid: int) -> float:
    """VmRSS of one process, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")) / 1e9


if __name__ == "__main__":
    main()

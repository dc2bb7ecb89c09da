"""The counterpart of `FakeGpu.memory` where tensors are real: the bytes that torch allocates on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch  # noqa: F401  (whose libraries the meter needs)

from nemo_steerlm.fake_gpu import guard


class RealMemory:
    """Counts what this process allocates from now on; begun before the model is built."""

    def __init__(self) -> None:
        self._meter = ctypes.CDLL(str(guard.compiled(Path(__file__).with_name("meter.cpp"))))
        for name in ("meter_now", "meter_peak"):
            getattr(self._meter, name).restype = ctypes.c_int64
        self._meter.meter_start()

    def restart(self) -> None:
        """Look for the peak from now on."""
        self._meter.meter_restart()

    @property
    def now(self) -> int:
        """Bytes that are allocated."""
        return self._meter.meter_now()

    @property
    def peak(self) -> int:
        """The most bytes since `restart`."""
        return self._meter.meter_peak()

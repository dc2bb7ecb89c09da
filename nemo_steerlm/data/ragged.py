"""Rows of different length as flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from nemo_steerlm.data.cache import Arrays


class RaggedBuilder:
    """Collects rows of different length in a flat array, without a Python object per row or number."""

    def __init__(self, typecode: str) -> None:
        self._flat, self._lengths = array(typecode), array("q")

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, row: Sequence[int] | bytes) -> None:
        """Add a row."""
        self._flat.extend(row)
        self._lengths.append(len(row))

    def arrays(self, name: str) -> Arrays:
        """The rows as `RaggedArray` takes them, under `name`."""
        return {name: np.asarray(self._flat), f"{name}_lengths": np.asarray(self._lengths)}


class RaggedArray:
    """Rows of different length in one flat array, in memory or in a file."""

    def __init__(self, arrays: Arrays, name: str) -> None:
        self._flat = arrays[name]
        self.lengths: np.ndarray = np.array(arrays[f"{name}_lengths"], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._flat[self._starts[index] : self._starts[index + 1]]

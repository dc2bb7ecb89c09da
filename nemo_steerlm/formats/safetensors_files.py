"""Weights in safetensors files: `model.safetensors`, or several files and the index that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.files import open_to_others
from nemo_steerlm.formats.hf_config import read_config
from nemo_steerlm.megatron.dtypes import SAFETENSORS

INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """The weights of a Hugging Face folder: `model.safetensors`, or the files its index names.

    Raises:
        CheckpointError: no safetensors there, or two sets of them; a file that the index names is missing, damaged,
            or lacks a tensor that it should hold.
    """

    format = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.where = folder
        index, single = folder / INDEX, folder / "model.safetensors"
        if index.is_file():
            weight_map = read_config(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: no weight_map in it")
            names = sorted({str(name) for name in weight_map.values()})
            if single.is_file() and single.name not in names:
                raise CheckpointError(
                    f"{folder}: holds {single.name} and {INDEX}, which names other files; remove the one that is old"
                )
        elif single.is_file():
            weight_map, names = None, [single.name]
        else:
            raise CheckpointError(
                f"{folder}: neither model.safetensors nor {INDEX} here; pickled weights (.bin, .pth) are not read, "
                f"save the model with safe_serialization=True"
            )
        self._files: dict[str, Any] = {}
        for file in (folder / name for name in names):
            try:
                handle = safe_open(file, framework="pt")
                held = set(handle.keys())
            except FileNotFoundError:
                raise CheckpointError(f"{file}: missing, but {index.name} names it") from None
            except SafetensorError as error:
                raise CheckpointError(f"{file}: damaged: {error}") from error
            wanted = held if weight_map is None else {n for n, name in weight_map.items() if name == file.name}
            if lost := sorted(wanted - held):
                raise CheckpointError(f"{file}: {len(lost)} tensors that {INDEX} places there are not: {some(lost)}")
            self._files.update(dict.fromkeys(sorted(wanted), handle))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first matrix, taken as that of all.

        Raises:
            CheckpointError: it is a quantised type.
        """
        name = next((n for n in self._files if n.endswith("q_proj.weight")), next(iter(self._files)))
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in SAFETENSORS:
            expected = ", ".join(SAFETENSORS)
            raise CheckpointError(f"{self.where}: {name} is stored as {stored}; expected one of {expected}")
        return SAFETENSORS[stored]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the files."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._files.items()}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (`dim` 0) or columns (1) `start` to `stop` of a tensor; only these bytes are read."""
        part = self._files[name].get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]

    def tokenizer_folder(self) -> Path:
        """The folder itself."""
        return self.where


class SafetensorsWriter:
    """Writes tensors in a given order, each file as soon as it has all its tensors."""

    def __init__(self, folder: Path, sizes: dict[str, int], max_file_bytes: int) -> None:
        """`sizes`: bytes of each tensor, in the order of the files; a tensor above `max_file_bytes` gets its own."""
        self.folder, self.total = folder, sum(sizes.values())
        self.weight_map: dict[str, str] = {}
        self.plan: list[list[str]] = [[]]
        self.pending: dict[str, torch.Tensor] = {}
        filled = 0
        for name, size in sizes.items():
            if self.plan[-1] and filled + size > max_file_bytes:
                self.plan.append([])
                filled = 0
            self.plan[-1].append(name)
            filled += size
        self.written = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor, in any order."""
        self.pending[name] = tensor.contiguous()
        while self.written < len(self.plan) and all(n in self.pending for n in self.plan[self.written]):
            names, count = self.plan[self.written], len(self.plan)
            self.written += 1
            file = "model.safetensors" if count == 1 else f"model-{self.written:05d}-of-{count:05d}.safetensors"
            save_file({n: self.pending.pop(n) for n in names}, self.folder / file, metadata={"format": "pt"})
            open_to_others(self.folder / file)
            self.weight_map.update(dict.fromkeys(names, file))

    def finish(self) -> None:
        """Write the index, where there are several files."""
        assert not self.pending and self.written == len(self.plan), "a tensor was not handed over"
        if len(self.plan) > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def some(names: list[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

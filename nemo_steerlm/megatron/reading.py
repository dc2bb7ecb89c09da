"""Reads a checkpoint without running code from it: folders may come from other people.

torch's distributed format keeps its index, `.metadata`, as a pickle, and reads single objects back with a full
unpickling; both run whatever code they name. Inside `reading` they may name the classes of an index and plain data,
nothing else. (The tensors and megatron-core's `common.pt` are read with torch's weights-only loading anyway.)
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle  # noqa: TID251 (what keeps others' pickles from running)
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.api import CheckpointException

from nemo_steerlm.errors import CheckpointError

# What torch 2.11 to 2.14 and megatron-core 0.16 to 0.19 put into `.metadata`; the last class is of older ones.
_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreSavePlan"},
}  # fmt: skip
# Transformer Engine unpickles its fp8 state out of a tensor of bytes: numbers, tensors, and the recipe.
_EXTRA_STATE = {"collections": {"OrderedDict"}, "torch._utils": {"_rebuild_tensor_v2"}, "torch": {"Size"}}
_STORAGES = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
_RECIPES = "transformer_engine.common.recipe"


class _Refused(pickle.UnpicklingError):
    """A pickle asks for something that is not allowed."""


class _Unpickler(pickle.Unpickler):
    allowed = _INDEX

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in self.allowed.get(module, ()):
            return super().find_class(module, name)
        raise _Refused(f"it asks for {module}.{name}, which may run code, and no checkpoint needs that")


class _ExtraStateUnpickler(_Unpickler):
    allowed = _EXTRA_STATE

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STORAGES:
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if module == _RECIPES and "." not in name:
            found = pickle.Unpickler.find_class(self, module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        return super().find_class(module, name)


class _IndexPickle:
    """The module `pickle`, whose `load` reads an index only."""

    load = staticmethod(lambda file, *args, **kwargs: _Unpickler(file, *args, **kwargs).load())

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)


def _check_plain(name: str, value: io.BytesIO) -> None:
    """Refuse a stored object that is more than plain data and tensors, which torch would unpickle next."""
    loaded = torch.load(value, map_location="cpu", weights_only=True)
    value.seek(0)
    if "_extra_state" in name:
        for state in loaded if isinstance(loaded, (list, tuple)) else [loaded]:
            if isinstance(state, torch.Tensor) and state.numel():
                _ExtraStateUnpickler(io.BytesIO(state.numpy().tobytes())).load()


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, torch and megatron-core read the checkpoint in `folder` and run no code from it.

    The patch replaces parts of torch (2.11 to 2.14, torch/distributed/checkpoint: the name `pickle` in filesystem.py,
    line 930 of 2.13, and `load_bytes` of `DefaultLoadPlanner` in default_planner.py, line 382). Where a version lacks
    them nothing is read, unlike with other patches: its own code would be unsafe. Remove when its index is not a
    pickle.

    Raises:
        CheckpointError: any failure inside, in one line.
    """
    planner: Any = default_planner.DefaultLoadPlanner
    parts: Any = filesystem
    if getattr(parts, "pickle", None) is not pickle or not hasattr(planner, "load_bytes"):
        raise CheckpointError(f"{folder}: torch {torch.__version__} reads checkpoints in a way not known to be safe")
    load_bytes = planner.load_bytes

    def checked(self: Any, read_item: Any, value: io.BytesIO, *args: Any, **kwargs: Any) -> None:
        _check_plain(str(read_item.dest_index.fqn), value)
        load_bytes(self, read_item, value, *args, **kwargs)

    full_unpickling = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    parts.pickle, planner.load_bytes = _IndexPickle(), checked
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        raise CheckpointError(f"{folder}: {_one_line(error)}") from error
    finally:
        parts.pickle, planner.load_bytes = pickle, load_bytes
        if full_unpickling is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = full_unpickling


def _one_line(error: BaseException) -> str:
    """The first failure of any rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # torch's message advises to trust the file
        why = str(error) if isinstance(error, _Refused) else "it holds more than plain data, which may run code"
        return f"refused, nothing was loaded: {why}"
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    said = f"{type(error).__name__}: {lines[0][:400]}"
    misfit = any(word in said.lower() for word in ("key", "shape", "size mismatch"))
    return f"its tensors do not fit this model: {said}" if misfit else f"damaged, nothing was loaded: {said}"

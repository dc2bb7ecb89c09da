"""The distributed optimizer's state in a checkpoint: every data-parallel rank writes and reads the share it holds.

megatron-core's `fully_reshardable` format (0.16 to 0.19) stores the state under the names and shapes of the
parameters, so that any layout reads it, but gathers the whole of it over the data-parallel ranks first. The tensors of
its checkpoints may be cut into any boxes, so that each rank can describe its own share, a range of the flattened
parameter, as the few boxes of rows that it covers: nothing is gathered, sent or copied on the device. A checkpoint has
the same tensors either way, and each way reads the other's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_steerlm.megatron import patches

_DESCRIBE, _LOAD = "sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"


def write_own_share(optimizer: Any) -> None:
    """Replace the gathering in the `fully_reshardable` format of one of megatron-core's optimizers.

    megatron-core 0.16.1 to 0.19.2, optimizer/distrib_optimizer.py: `sharded_param_state_fully_reshardable` (line 1404
    of 0.16.1). Remove when it has a format that any layout reads and nothing gathers. A version without the methods
    replaced here keeps its own way: `checkpoint.metadata` asks it to gather in CPU memory, on one rank.
    """
    if not isinstance(optimizer, DistributedOptimizer):
        return
    own = {
        _DESCRIBE: partial(_own_share, optimizer),
        _LOAD: lambda state, *_, **__: None,  # the boxes are views: reading them filled the optimizer
    }
    effect = "checkpoints are gathered on one rank, which takes longer and more memory"
    patches.replace(optimizer, effect, ("_get_main_param_and_optimizer_states",), **own)


def _own_share(optimizer: Any, model_state: dict[str, Any], *_: Any, **__: Any) -> dict[str, ShardedTensor]:
    """This rank's part of the main parameters and both moments, as views of the optimizer's tensors."""
    entries = nested_values(extract_sharded_tensors_and_factories(model_state)[0])
    by_parameter = {entry.data: entry for entry in entries}
    state: dict[str, ShardedTensor] = {}
    for buckets in (buckets for buffer in optimizer.gbuf_ranges for buckets in buffer.values()):
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            for piece, first, offset, size in _boxes_of(by_parameter[parameter], parameter, ranges["param"]):
                for name in tensors.keys() - {"step"}:
                    data = tensors[name].view(-1)[first : first + math.prod(size)].view(size)
                    state[str(len(state))] = _box(f"optimizer.state.{name}.{piece.key}", data, piece, offset)
    return state


def _boxes_of(entry: Any, parameter: torch.Tensor, own: Any) -> Iterator[tuple[ShardedTensor, int, tuple, tuple]]:
    """The boxes that the range `own` of a flattened parameter covers in the tensors stored for it.

    Yields:
        The stored tensor (one, or two for a gated fc1), the box's first element in `own`, its offset and size in the
        stored tensor.
    """
    pieces = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for piece in pieces:
        assert piece.data.is_contiguous(), f"{piece.key}: not stored as a whole number of rows"
        begin = piece.data.storage_offset() - parameter.storage_offset()
        start, stop = max(own.start, begin), min(own.end, begin + piece.data.numel())
        prepended = (1,) * piece.prepend_axis_num
        for first, offset, size in boxes(piece.local_shape, start - begin, stop - begin):
            inside = (0,) * len(prepended) + offset
            yield piece, begin + first - own.start, _plus(piece.global_offset, inside), prepended + size


def _box(key: str, data: torch.Tensor, whole: ShardedTensor, offset: tuple[int, ...]) -> ShardedTensor:
    """A box of a stored tensor; it has replicas over tensor-parallel ranks only."""
    assert len(whole.replica_id) == 3, f"{key}: expected (pipeline, tensor, data) replica, got {whole.replica_id}"
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=whole.global_shape,
        global_offset=offset,
        axis_fragmentations=None,  # no regular grid
        replica_id=(*whole.replica_id[:2], 0),
        allow_shape_mismatch=whole.allow_shape_mismatch,
    )


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut the elements `start` to `stop` of a row-major tensor into boxes, in order.

    Yields:
        The box's first element, its offset and its size: of a matrix a part of a row, whole rows, a part of a row.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        whole = 0 if within else (stop - start) // row
        if whole:
            yield start, (index, *(0 for _ in shape[1:])), (whole, *shape[1:])
            start += whole * row
        else:
            end = min(stop, start - within + row)
            for first, offset, size in boxes(shape[1:], within, within + end - start):
                yield index * row + first, (index, *offset), (1, *size)
            start = end


def _plus(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))

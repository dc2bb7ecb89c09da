"""Process groups of a job of which only one process exists: torch's fake groups, each with the backend asked for.

Collectives leave their tensors as they are; gathered objects are this rank's own, once for each rank.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.distributed import distributed_c10d

_backends: dict[str, str] = {}  # name of a group -> the backend it would have


def install() -> None:
    """Let every process group that is made from now on be a fake one."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  (rules of collectives for fake tensors)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init, make = dist.init_process_group, dist.new_group

    def init_process_group(backend: str, **_: Any) -> None:
        init("fake", store=FakeStore(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
        _backends[_default_name()] = backend

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *_: Any, **__: Any) -> Any:
        group = make(ranks, backend="fake")
        if isinstance(group, dist.ProcessGroup):
            _backends[group.group_name] = backend or _backends[_default_name()]
        return group

    def get_backend(group: Any = None) -> str:
        return _backends[_default_name() if group is None else group.group_name]

    for module in (dist, distributed_c10d):
        for function in (new_group, all_gather_object, gather_object, broadcast_object_list, scatter_object_list):
            setattr(module, function.__name__, function)
    dist.init_process_group, dist.get_backend = init_process_group, get_backend  # type: ignore[assignment]


def write_alone() -> None:
    """Let a checkpoint hold what this rank writes, though the others write nothing. After megatron-core's import.

    (Names of megatron-core 0.16 to 0.19 and torch 2.11 to 2.14: how they check that all ranks together have written
    every tensor once.)
    """
    from megatron.core.dist_checkpointing import state_dict_utils, validation
    from megatron.core.dist_checkpointing.strategies import fully_parallel
    from torch.distributed.checkpoint import default_planner, utils

    complete, valid, gather = (
        validation.validate_sharding_integrity,
        default_planner._validate_global_plan,
        utils._DistWrapper.gather_object,
    )

    def validate_sharding_integrity(*args: Any, **kwargs: Any) -> None:
        if dist.get_world_size() == 1:
            complete(*args, **kwargs)

    def validate_global_plan(*args: Any) -> Any:
        return valid(*args) if dist.get_world_size() == 1 else []

    def gather_plan(self: Any, mine: Any) -> Any:
        return gather(self, mine) if dist.get_world_size() == 1 else [mine]

    for module in (state_dict_utils, validation, fully_parallel):
        module.validate_sharding_integrity = validate_sharding_integrity
    default_planner._validate_global_plan = validate_global_plan  # type: ignore[assignment]
    utils._DistWrapper.gather_object = gather_plan  # type: ignore[method-assign, assignment]


def _default_name() -> str:
    return distributed_c10d._get_default_group().group_name


def all_gather_object(object_list: list, obj: Any, group: Any = None) -> None:
    """Everyone says what this rank says."""
    object_list[:] = [obj] * len(object_list)


def gather_object(obj: Any, object_gather_list: list | None = None, *_: Any, **__: Any) -> None:
    """Everyone says what this rank says."""
    if object_gather_list is not None:
        object_gather_list[:] = [obj] * len(object_gather_list)


def broadcast_object_list(object_list: list, *_: Any, **__: Any) -> None:
    """The source says what this rank says."""


def scatter_object_list(
    scatter_object_output_list: list, scatter_object_input_list: list | None = None, *_: Any, **__: Any
) -> None:
    """This rank gets the first of what it gives."""
    scatter_object_output_list[0] = scatter_object_input_list[0] if scatter_object_input_list else None


def done() -> Any:
    """The handle of a collective that has ended."""
    from torch._C._distributed_c10d import FakeWork

    return FakeWork().boxed()


def check(func: Any, args: Any) -> None:
    """Refuse CPU tensors in a group of NCCL, as torch does."""
    if "barrier" in str(func):  # its tensor is made for the group
        return
    leaves = pytree.tree_leaves(args)
    name = next((_group_name(value) for value in leaves if isinstance(value, torch.ScriptObject)), None)
    on_cpu = [value for value in leaves if isinstance(value, torch.Tensor) and value.device.type == "cpu"]
    if on_cpu and _backends.get(name or "") == "nccl":
        raise RuntimeError(f"{func}: No backend type associated with device type cpu (the group is one of NCCL)")


def _group_name(value: Any) -> str | None:
    try:
        return dist.ProcessGroup.unbox(value).group_name
    except RuntimeError:  # a ReduceOp
        return None

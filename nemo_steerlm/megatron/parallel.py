"""Start and stop torch.distributed and megatron-core's process groups.

One process is the smallest case of many: a notebook calls `initialize` with a layout of one, a SLURM job with its own.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import cpu


@dataclass(frozen=True)
class _Layout:
    tensor: int
    pipeline: int
    virtual: int | None


_active: _Layout | None = None


def device() -> torch.device:
    """The device of this process: its own GPU (LOCAL_RANK), or the CPU where CUDA is absent."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _require_gpu() -> None:
    """Refuse `trainer.accelerator=gpu` (the command line leaves STEERLM_REQUIRE_GPU) where CUDA is absent."""
    if os.environ.get("STEERLM_REQUIRE_GPU") and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ConfigError(
            f"trainer.accelerator=gpu: torch {torch.__version__} (built {built}) sees no GPU here; "
            "use trainer=cpu, or install the torch that belongs to this machine's driver"
        )


def _start_processes(timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # no port and no other process needed
        dist.init_process_group(
            backend,
            store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timeout,
        )
    else:
        dist.init_process_group(backend, timeout=timeout)


def initialize(
    parallel: ParallelConfig | None = None, seed: int = 1234, timeout: timedelta = timedelta(minutes=30)
) -> None:
    """Join the job's processes and lay them out in tensor, pipeline and data parallel groups; idempotent.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment as torchrun sets them; without them this
    is a world of one. Calling it again with another layout rebuilds megatron-core's groups.

    Raises:
        ConfigError: the number of processes is not a multiple of tensor x pipeline, or a GPU is asked for and absent.
    """
    parallel = parallel or ParallelConfig()
    layout = _Layout(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline)
    with contextlib.nullcontext() if torch.cuda.is_available() else cpu.one_gloo_device():
        _join(layout, timeout)
    seed_everything(seed)


def _join(layout: _Layout, timeout: timedelta) -> None:
    global _active
    if not dist.is_initialized():
        _require_gpu()
        _start_processes(timeout)
    world = dist.get_world_size()
    if world % (layout.tensor * layout.pipeline):
        raise ConfigError(
            f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} does not divide the {world} "
            f"started processes; start a multiple of {layout.tensor * layout.pipeline} (trainer.devices=)"
        )
    if not (parallel_state.is_initialized() and layout == _active):
        parallel_state.destroy_model_parallel()
        # With gloo groups beside NCCL's: the optimizer asks for them, and gathers its state over them at a save.
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, layout.virtual)
        _active = layout


def seed_everything(seed: int) -> None:
    """Seed torch and megatron-core's named random streams.

    The stream of replicated regions is equal on every tensor-parallel rank, the stream of sharded regions differs
    (``model_parallel_cuda_manual_seed``); both differ between pipeline stages.
    """
    torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave all groups; harmless when nothing was started."""
    global _active
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _active = None


def is_rank_zero() -> bool:
    """Whether this process writes files and speaks for the job."""
    return not dist.is_initialized() or dist.get_rank() == 0


def data_parallel() -> tuple[int, int]:
    """This process's data-parallel rank, and how many there are."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def sum_over_data_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor of one shape over the data-parallel ranks, in place."""
    dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor


def barrier() -> None:
    """Wait for every process of the job."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def broadcast_object(value: object, source: int = 0) -> object:
    """Rank `source`'s picklable small value on every rank (file lists, decisions: never tensors)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]

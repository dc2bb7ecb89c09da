"""Start and stop torch.distributed and megatron-core's process groups.

A single process is an ordinary case: a notebook calls `initialize` with a layout of one process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_steerlm import hub
from nemo_steerlm.config import ComputeConfig, InProcesses, ParallelConfig
from nemo_steerlm.errors import ConfigError, SteerLMError
from nemo_steerlm.megatron import cpu

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Layout:
    tensor: int
    pipeline: int
    virtual: int | None


_active: _Layout | None = None
_timeout = timedelta(minutes=30)
_hosts: Any = None  # on GPUs, a gloo group of all processes


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU where CUDA is absent.

    LOCAL_RANK counts a node's GPUs. If a scheduler shows each process only its own GPU, that is its first.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def _require_gpu() -> None:
    """Refuse `trainer.accelerator=gpu` (the command line leaves STEERLM_REQUIRE_GPU) where CUDA is absent."""
    if os.environ.get("STEERLM_REQUIRE_GPU") and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ConfigError(
            f"trainer.accelerator=gpu: torch {torch.__version__} (built {built}) sees no GPU here; "
            "use trainer.accelerator=cpu, or install the torch that belongs to this machine's driver"
        )


def _start_processes() -> None:
    """Start torch.distributed, and check that this process's device and backend work."""
    global _hosts
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # no port and no other process needed
        dist.init_process_group(
            backend,
            store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=_timeout,
        )
    else:
        _resolve_first_host()
        dist.init_process_group(backend, timeout=_timeout)
    if torch.cuda.is_available():
        _hosts = dist.new_group(backend="gloo", timeout=_timeout)
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            _refuse_shared_gpus()
    started = torch.ones(1, device=device())
    dist.all_reduce(started)  # NCCL connects at its first collective
    started.item()  # and fails only when its result is read


def _resolve_first_host() -> None:
    """Refuse a MASTER_ADDR that cannot be resolved, which torch would look up until its time is over (OSError)."""
    host = os.environ.get("MASTER_ADDR")
    try:
        if host:
            socket.getaddrinfo(host, None)
    except OSError as error:
        raise OSError(
            f"MASTER_ADDR={host}, where the processes meet, cannot be resolved ({error.strerror}); set it to a name "
            "or address of the first node that every node knows"
        ) from error


def _refuse_shared_gpus() -> None:
    """Refuse two processes on one GPU, where NCCL fails; every process of the job raises the same ConfigError.

    GPU ids are compared, because LOCAL_RANK and the number of visible GPUs do not identify a GPU.
    """
    gpus = [""] * dist.get_world_size()
    dist.all_gather_object(gpus, str(torch.cuda.get_device_properties(device()).uuid), group=_hosts)
    shared = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if shared is not None:
        ranks = ", ".join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared)
        visible = torch.cuda.device_count()
        raise ConfigError(
            f"ranks {ranks} would share one GPU ({shared}); start one process for each GPU of a node: this one sees "
            f"{visible} (trainer.devices={visible}), or use trainer.accelerator=cpu"
        )


@contextlib.contextmanager
def _told_with_the_rank() -> Iterator[None]:
    """Turns a failure to start a device or backend into a ConfigError of one line."""
    try:
        yield
    except SteerLMError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        message = " ".join(str(error).split())
        raise ConfigError(
            f"rank {rank} of {world} cannot start on {device()} of {socket.gethostname()}: {message[:400]}"
        ) from error


def start(config: InProcesses, seed: int = 1234) -> None:
    """Begin a verb: check its configuration, join its processes, and fill in the settings it runs with.

    `config.trainer.precision` is set, and `config.trainer.devices` where Python code was started as one of several
    processes; the command line starts as many processes as configured.

    Args:
        config: of a verb.
        seed: as of `initialize`.

    Raises:
        ConfigError: as its `validate`, as `initialize`, or the processes have models of the hub at different commits.
    """
    trainer = config.trainer
    trainer.devices = max(1, int(os.environ.get("WORLD_SIZE", 1)) // max(1, trainer.num_nodes))
    config.validate()
    initialize(config.parallel, seed, timedelta(minutes=trainer.timeout_minutes))
    _same_commits(config)
    if isinstance(trainer, ComputeConfig):  # conversions compute nothing
        trainer.precision = resolve_precision(trainer.precision)


def _same_commits(config: InProcesses) -> None:
    """Refuse a job of torchrun or srun whose processes saw a branch of the hub before and after a push."""
    mine = hub.commits(config)
    if mine and dist.get_world_size() > 1:
        all_commits: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_commits, mine)
        for name, commit in sorted({pair for one in all_commits for pair in one} - set(mine)):
            raise ConfigError(
                f"the processes read {name} at different commits: it was changed on the hub just now; start again, or "
                f"give {name}@{commit}"
            )


def initialize(parallel: ParallelConfig | None = None, seed: int = 1234, timeout: timedelta | None = None) -> None:
    """Join the job's processes and make tensor, pipeline and data parallel groups; idempotent.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment as torchrun sets them; without them this
    is a world of one. Calling it again with another layout rebuilds megatron-core's groups.

    Args:
        parallel: the layout.
        seed: of the random streams.
        timeout: how long a process waits for the others in a collective of new groups; None: unchanged, initially 30
            minutes.

    Raises:
        ConfigError: the number of processes is not a multiple of tensor x pipeline, a GPU is asked for and absent or
            shared by two processes, or this process cannot start.
    """
    global _timeout
    parallel, _timeout = parallel or ParallelConfig(), timeout or _timeout
    layout = _Layout(parallel.tensor, parallel.pipeline, parallel.virtual_pipeline)
    with _told_with_the_rank(), contextlib.nullcontext() if torch.cuda.is_available() else cpu.one_gloo_device():
        _join(layout)
    seed_everything(seed)


def resolve_precision(asked: str | None) -> str:
    """The number format of a computation: `asked`, else (which is logged) bf16 on a GPU and fp32 on a CPU."""
    if asked is not None:
        return asked
    chosen, where = ("bf16", "GPU") if torch.cuda.is_available() else ("fp32", "CPU")
    if is_rank_zero():
        logger.info("precision: %s, as on every %s; trainer.precision chooses another", chosen, where)
    return chosen


def _join(layout: _Layout) -> None:
    global _active
    if not dist.is_initialized():
        _require_gpu()
        _start_processes()
    world = dist.get_world_size()
    if world % (layout.tensor * layout.pipeline):
        raise ConfigError(
            f"parallel.tensor={layout.tensor} x parallel.pipeline={layout.pipeline} does not divide the {world} "
            f"started processes; start a multiple of {layout.tensor * layout.pipeline} (trainer.devices=)"
        )
    if not (parallel_state.is_initialized() and layout == _active):
        parallel_state.destroy_model_parallel()
        # With gloo groups beside NCCL's: the optimizer asks for them, and gathers its state over them at a save.
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, layout.virtual,
            distributed_timeout_minutes=_timeout.total_seconds() / 60,  # type: ignore[arg-type]  # to a timedelta
        )  # fmt: skip
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
    global _active, _hosts
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _active = _hosts = None


def is_rank_zero() -> bool:
    """Whether this process writes files and logs for the job."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_first_of_node() -> bool:
    """Whether this process works on the disk of its node for the other processes there."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def data_parallel() -> tuple[int, int]:
    """This process's data-parallel rank, and how many there are."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def sum_over_data_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor of one shape over the data-parallel ranks, in place."""
    dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    return tensor


def gather_data_parallel(values: list[T]) -> list[list[T]]:
    """The list of every data-parallel rank, in the order of the ranks, on each of them (small picklable values)."""
    group = parallel_state.get_data_parallel_group()
    found: list[Any] = [values] * group.size()
    if group.size() > 1:
        dist.all_gather_object(found, values, group=group)
    return found


def barrier() -> None:
    """Wait for every process of the job."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def highest(*numbers: int) -> list[int]:
    """Each number's highest value over all processes of the job, which wait for each other but for no GPU."""
    found = torch.tensor(numbers, device=device() if _hosts is None else "cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_hosts)
    return found.tolist()


def broadcast_object(value: object, source: int = 0) -> object:
    """Rank `source`'s picklable small value on every rank (file lists, decisions: never tensors)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank: one process hashes or writes files, others wait.

    Raises:
        Exception: the exception of rank 0, on every rank.
    """
    outcome: Any = None
    if is_rank_zero():
        try:
            outcome = (function(), None)
        except Exception as error:
            outcome = (None, error)
    result, failed = cast(Any, broadcast_object(outcome))
    if failed is not None:
        raise failed
    return result

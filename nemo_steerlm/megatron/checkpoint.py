"""Weights and training state in megatron-core's distributed format: any layout writes, any layout reads.

Every folder is written under a name that ends in `.unfinished` and renamed when complete, so that a folder without
that ending is always complete.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nemo_steerlm import integrity
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.files import sync_folder
from nemo_steerlm.megatron import patches
from nemo_steerlm.megatron.parallel import barrier, broadcast_object, device, is_first_of_node, is_rank_zero
from nemo_steerlm.megatron.reading import reading
from nemo_steerlm.ownership import UNFINISHED
from nemo_steerlm.provenance import sha256_file

_log = logging.getLogger(__name__)


def metadata() -> dict[str, Any]:
    """The format of optimizer state: by parameter, so that it follows the weights to any other layout.

    The second key is only read where `optimizer_state.write_own_share` could not avoid gathering.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": torch.cuda.is_available(),
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(chunks: list[Any]) -> dict[str, Any]:
    """Sharded state of all model chunks of this rank."""
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata()) for i, chunk in enumerate(chunks)}


def load_model_state(chunks: list[Any], state: dict[str, Any]) -> None:
    """Load a `model_state` into the chunks."""
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"], strict=True)


def training_state(chunks: list[Any]) -> dict[str, Any]:
    """As `model_state`, without frozen weights: a resumed run loads those from its start again."""
    state = model_state(chunks)
    for chunk, part in zip(chunks, state.values(), strict=True):
        frozen = {name for name, parameter in chunk.named_parameters() if not parameter.requires_grad}
        for name in [n for n in part if n in frozen or (frozen and n.endswith("_extra_state"))]:
            del part[name]
    return state


def load_training_state(chunks: list[Any], state: dict[str, Any]) -> None:
    """Load a `training_state` into chunks that hold their frozen weights already."""
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(state[f"model{i}"], strict=False)
        trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
        assert not unexpected and not trained & set(missing), (unexpected, missing)


def _plain(value: Any) -> Any:
    """Plain containers and numbers only: the common part is read back with a weights-only load."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, bool, str, torch.Tensor, type(None))) else str(value)


def save(folder: Path, sharded: dict[str, Any], common: dict[str, Any] | None = None) -> None:
    """Write one distributed checkpoint, by all ranks together; the folder appears only when it is complete.

    Every data-parallel rank writes a share of similar size, one tensor after the other: this takes no GPU memory, and
    host memory for the largest tensor of the share.
    """
    if background_fits():
        PendingSave(folder, sharded, common, background=False).finish()
        return
    partial = empty_partial(folder, is_rank_zero())
    dist_checkpointing.save({**sharded, "common": _plain(common or {})}, str(partial), _strategy())
    barrier()
    if is_rank_zero():
        integrity.write_sums(partial)
    replace_folder(partial, folder)


def background_fits() -> bool:
    """Whether `PendingSave` supports megatron-core's writer; else the loss is logged.

    megatron-core 0.16.1 to 0.19.2, dist_checkpointing/strategies/filesystem_async.py: `write_preloaded_data`. Remove
    with `PendingSave`.
    """
    try:
        signature(FileSystemWriterAsync.write_preloaded_data).bind(*range(6))
        signature(dist_checkpointing.save).bind_partial(async_sharded_save=True)
    except (AttributeError, TypeError) as error:
        part = f"{FileSystemWriterAsync.__module__}.{FileSystemWriterAsync.__qualname__}"
        patches.leave(
            part,
            error,
            "trainer.async_checkpoint and checkpoint_local_dir have no effect, training waits for its checkpoints",
        )
        return False
    return True


def empty_partial(folder: Path, makes: bool) -> Path:
    """Where the content of `folder` is written until it is complete: made by the rank with `makes`, others wait."""
    partial = folder.with_name(folder.name + UNFINISHED)
    if makes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    return partial


def _strategy() -> Any:
    # The default queue starts a manager process (seconds); one within this process is enough. megatron-core 0.16.1
    # to 0.19.2, dist_checkpointing/strategies/filesystem_async.py, line 55 of 0.16.1. Remove with `PendingSave`.
    patches.replace(filesystem_async, "a process more is started to write checkpoints", _results_queue=queue.Queue())
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(strategy, group) if group.size() > 1 else strategy


class PendingSave:
    """A checkpoint that is being written, in a thread while training goes on, or before the constructor returns.

    megatron-core plans it and ends it (both with collectives, so in the main thread) but would write it in a forked
    process. That is unsafe beside the threads of gloo, NCCL and CUDA, and newer versions cannot do it in background
    without nvidia_resiliency_ext. A thread has no copy-on-write, so everything is copied to CPU memory before it
    starts. Remove when megatron-core (0.16.1 to 0.19.2, dist_checkpointing/strategies: `AsyncRequest`) writes in a
    thread.

    Every rank makes the same calls in the same order.

    Args:
        folder: where it goes.
        sharded, common: as of `save`.
        background: whether a thread writes it; only the copying of this rank's share to CPU memory happens at once.
        local: whether each node has a `folder` of its own, which gets the files of its ranks and the list of all.
    """

    def __init__(
        self, folder: Path, sharded: dict[str, Any], common: dict[str, Any] | None = None, background: bool = True,
        local: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self._local, self._makes = folder, local, is_first_of_node() if local else is_rank_zero()
        self._partial = empty_partial(folder, self._makes)
        state = {**sharded, "common": _plain(common or {})}
        # From 0.18 on the default is a separate package; only the plan is used here, not the writer.
        own = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
        request: Any = dist_checkpointing.save(state, str(self._partial), _strategy(), async_sharded_save=True, **own)
        self._finalize = request.finalize_fns
        self._sums: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        if request.async_fn is not None:  # else this rank has nothing to write
            _, buckets, results = request.async_fn_args
            transforms = request.async_fn.args[0]
            if background:
                copies = [(path, key, (data, list(_on_cpu(tensors, True)))) for path, key, (data, tensors) in buckets]
                self._thread = threading.Thread(
                    target=_write, args=(transforms, copies, results, self._sums), daemon=True
                )
                self._thread.start()
            else:
                one_by_one = [(path, key, (data, _on_cpu(tensors))) for path, key, (data, tensors) in buckets]
                _write(transforms, one_by_one, results, self._sums)

    def poll(self) -> bool:
        """End the save if every rank has written its part; returns whether it did."""
        done = ended_everywhere(self._thread)
        if done:
            self.finish()
        return done

    def finish(self) -> None:
        """Wait for the writing, then give the folder its name.

        Raises:
            Exception: megatron-core's, on every rank, if one could not write.
        """
        if self._thread is not None:
            self._thread.join()
        for function in self._finalize:
            function()
        sums: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sums, self._sums)
        known = {name: digest for part in sums for name, digest in part.items()}
        if is_rank_zero():
            integrity.write_sums(self._partial, known)
        if self._local:  # files of other nodes are not in rank 0's folder, those of megatron-core in no other
            listed: Any = broadcast_object({**known, **integrity.read_sums(self._partial)})
            if self._makes:
                integrity.write_list(self._partial, listed)
        replace_folder(self._partial, self.folder, self._makes)


def ended_everywhere(thread: threading.Thread | None) -> bool:
    """Whether the thread of every rank has ended."""
    running = torch.tensor(float(thread is not None and thread.is_alive()), device=device())
    if dist.get_world_size() > 1:
        dist.all_reduce(running)
    return not running


def _on_cpu(tensors: list[tuple[Any, torch.Tensor]], copy: bool = False) -> Iterator[tuple[Any, torch.Tensor]]:
    return ((item, tensor.to("cpu", copy=copy)) for item, tensor in tensors)


def _write(transforms: list, buckets: list, results: queue.Queue, sums: dict[str, str]) -> None:
    """Write this rank's files and put their sha256 into `sums`.

    The results, or the error, go to the queue that megatron-core reads when it ends the save.
    """
    written: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        outcome: queue.Queue = queue.Queue()
        counter: queue.Queue = queue.Queue()
        counter.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, counter, True)
        written[index] = outcome.get()[1]
        if not isinstance(written[index], Exception):
            sums[bucket[1]] = sha256_file(bucket[0])
    failed = [outcome for outcome in written.values() if isinstance(outcome, Exception)]
    results.put(failed[0] if failed else written)


def load(folder: Path, sharded: dict[str, Any], verify: bool = True) -> dict[str, Any]:
    """Read the tensors of `sharded`, and the common part under "common"; no code in the folder is run.

    Args:
        verify: compare the files with the folder's list while they are read; each rank takes a share of them.

    Raises:
        CheckpointError: there is no complete checkpoint in the folder, its tensors do not fit the model, or it is
            damaged or holds more than data.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no complete checkpoint here (metadata.json is missing)")
    with _checked(folder) if verify else contextlib.nullcontext(), reading(folder):
        return dist_checkpointing.load(_keep_absent_extra_state(folder, sharded), str(folder))


@contextlib.contextmanager
def _checked(folder: Path) -> Iterator[None]:
    """Inside, a thread checks this rank's share of the files against the sha256 list; at the end all ranks agree.

    Raises:
        CheckpointError: a file has changed since it was written; raised on every rank.
    """
    found: list[str] = []

    def check() -> None:
        try:
            names = sorted(integrity.read_sums(folder))
            integrity.check(folder, names[dist.get_rank() :: dist.get_world_size()])
        except (CheckpointError, OSError) as error:
            found.append(str(error))

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    try:
        yield
    except CheckpointError as error:
        thread.join()
        if found:
            raise CheckpointError(found[0]) from error
        raise
    thread.join()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    problems = [problem for part in everywhere for problem in part]
    if problems:
        raise CheckpointError(problems[0])


def _keep_absent_extra_state(folder: Path, sharded: dict[str, Any]) -> dict[str, Any]:
    """Let modules keep their `_extra_state` where the checkpoint has none.

    Tensors have the same names whether Transformer Engine's layers or torch's wrote them (megatron-core stores the
    norms of torch's under Transformer Engine's names). But Transformer Engine's norms also expect fp8 state, which
    torch's do not have.
    """
    stored = load_sharded_metadata(str(folder))

    def keep(value: Any) -> Any:
        absent = isinstance(value, ShardedObject) and value.unique_key not in stored
        return LocalNonpersistentObject(value.data) if absent and value.key.endswith("._extra_state") else value

    return dict_list_map_inplace(keep, sharded)


def stored_names(folder: Path) -> set[str]:
    """Names of the tensors in a checkpoint; none where there is no complete one."""
    return set(_stored(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """The type that the weights in a checkpoint are stored in, taken from the embedding.

    Raises:
        CheckpointError: there is no complete checkpoint of a model in the folder.
    """
    embedding = _stored(folder).get("embedding.word_embeddings.weight")
    if embedding is None:
        raise CheckpointError(f"{folder}: no complete checkpoint of a model here")
    return embedding.dtype


def _stored(folder: Path) -> dict[str, Any]:
    if not (folder / "metadata.json").is_file():
        return {}
    with reading(folder):
        return dist_checkpointing.load_tensors_metadata(str(folder))


def replace_folder(partial: Path, folder: Path, renames: bool | None = None) -> None:
    """Give a complete folder its final name, replacing what was there: rank 0, or the ranks with `renames`, does."""
    barrier()
    if is_rank_zero() if renames is None else renames:
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


class CheckpointFolder:
    """The training checkpoints of one run: `step-000120/`, newest last.

    Args:
        folder: where they lie.
        keep: how many of the newest stay on disk.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps lies."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        names = [p.name.removeprefix("step-") for p in found if (p / "metadata.json").is_file()]
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> Path | None:
        """The newest intact checkpoint, agreed on by all ranks; newer, damaged ones are logged.

        Unfinished ones are removed.
        """
        if is_rank_zero():
            for leftover in self.folder.glob("*" + UNFINISHED):
                shutil.rmtree(leftover, ignore_errors=True)
        steps: Any = broadcast_object(self.steps())
        for step in reversed(steps):
            try:
                with _checked(self.path(step)):
                    return self.path(step)
            except CheckpointError as error:
                _log.warning("skipped the checkpoint of step %d: %s", step, error)
        return None

    def prune(self) -> None:
        """Remove all but the newest `keep`."""
        if is_rank_zero():
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(step), ignore_errors=True)

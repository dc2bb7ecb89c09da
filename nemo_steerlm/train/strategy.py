"""Lightning's side of the engine: a strategy whose processes, data parallelism and checkpoints are megatron-core's."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from megatron.core import parallel_state

from nemo_steerlm.megatron import checkpoint as distributed_checkpoint
from nemo_steerlm.megatron import finite, parallel
from nemo_steerlm.megatron.local_disk import LocalDisk, PendingCopy


class DistributedCheckpointIO(CheckpointIO):
    """Checkpoints as folders in megatron-core's distributed format.

    Args:
        background: write them in a thread while training goes on, one at a time.
        local: write them there; they are copied out in the background, one at a time.
    """

    def __init__(self, background: bool = False, local: LocalDisk | None = None) -> None:
        self.background, self.local = background, local
        self.pending: distributed_checkpoint.PendingSave | None = None
        self.copying: PendingCopy | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written or copied."""
        return self.pending is not None or self.copying is not None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` ({"sharded": ..., "common": ...}) to the folder `path`."""
        self._end_writing()
        if (self.background or self.local) and distributed_checkpoint.background_fits():
            folder = Path(path) if self.local is None else self.local.folder / Path(path).name
            save, content = distributed_checkpoint.PendingSave, (checkpoint["sharded"], checkpoint["common"])
            self.pending = save(folder, *content, background=self.background, local=self.local is not None)
            if not self.background:
                self._end_writing()
        else:
            distributed_checkpoint.save(Path(path), checkpoint["sharded"], checkpoint["common"])

    def poll(self) -> None:
        """End what is written or copied by now; every rank calls it between two steps."""
        if self.pending is not None and self.pending.poll():
            self._copy_out()
        if self.copying is not None and self.copying.poll():
            self.copying = None

    def finish(self) -> None:
        """Wait until nothing is being written or copied."""
        self._end_writing()
        self._end_copying()

    def _end_writing(self) -> None:
        if self.pending is not None:
            self.pending.finish()
            self._copy_out()

    def _copy_out(self) -> None:
        """After a checkpoint is written: begin to copy it out, once the one before is."""
        assert self.pending is not None
        name, self.pending = self.pending.folder.name, None
        if self.local is not None:
            self._end_copying()
            self.copying = self.local.copy_out(name)

    def _end_copying(self) -> None:
        if self.copying is not None:
            self.copying.finish()
            self.copying = None

    def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:
        """Not used: loading needs the sharded state, which `MegatronStrategy.load_checkpoint` has."""
        raise AssertionError("load through MegatronStrategy.load_checkpoint")

    def remove_checkpoint(self, path: Any) -> None:
        """Not used: `CheckpointFolder.prune` removes old checkpoints."""
        raise AssertionError("remove through CheckpointFolder.prune")


def _environment() -> TorchElasticEnvironment:
    """Lightning's view of the already started processes (RANK, WORLD_SIZE, ... as torchrun sets them)."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("GROUP_RANK", 0)):
        os.environ.setdefault(name, str(value))
    return TorchElasticEnvironment()


def _zeroed(progress: Any) -> Any:
    """The same nested counters, all at their start."""
    if isinstance(progress, dict):
        return {name: _zeroed(value) for name, value in progress.items()}
    return type(progress)() if isinstance(progress, (bool, int)) else progress


class MegatronStrategy(DDPStrategy):
    """Lightning drives the loop; megatron-core owns the processes, gradients, optimizer and checkpoints.

    It is a DDPStrategy so that NeMo's exp_manager accepts it, and never wraps the model: megatron-core's
    DistributedDataParallel stands inside the module. `nemo_steerlm.megatron.parallel.initialize` comes first.

    Args:
        checkpoints: how they are written.
    """

    def __init__(self, checkpoints: DistributedCheckpointIO) -> None:
        environment = _environment()
        # This process's device, once per local process: the devices that others see are unknown here.
        devices = [parallel.device()] * int(os.environ["LOCAL_WORLD_SIZE"])
        super().__init__(parallel_devices=devices, cluster_environment=environment, checkpoint_io=checkpoints)

    def setup_distributed(self) -> None:
        """Only sets the ranks: the process groups exist already."""
        assert torch.distributed.is_initialized(), "call nemo_steerlm.megatron.parallel.initialize first"
        self.set_world_ranks()

    def _configure_launcher(self) -> None:
        """No launcher: the processes run already, and launching fails in a notebook.

        A private hook of DDPStrategy (Lightning 2.4.0, pytorch/strategies/ddp.py, line 144). Remove when Lightning
        makes none beside a cluster environment that has started the processes.
        """
        self._launcher = None

    def configure_ddp(self) -> None:
        """Nothing to wrap."""

    def _setup_model(self, model: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
        return model

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """Data-parallel size and rank (tensor and pipeline ranks share their data)."""
        return {
            "num_replicas": parallel_state.get_data_parallel_world_size(),
            "rank": parallel_state.get_data_parallel_rank(),
        }

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Model and optimizer must exist before their sharded state can be asked for."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights travel in the sharded state."""
        return OrderedDict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Empty: optimizer state travels in the sharded state."""
        return {}

    def _sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        module: Any = self.lightning_module
        state = module.training_state()
        optimizer = module.optimizer.sharded_state_dict(
            state["model"], is_loading=is_loading, metadata=distributed_checkpoint.metadata()
        )
        return {**state, "optimizer": optimizer}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write Lightning's progress and all sharded state; every rank calls it.

        Raises:
            CheckpointError: a weight is not finite; nothing is written.
        """
        common = {key: checkpoint[key] for key in ("epoch", "global_step", "loops", "pytorch-lightning_version")}
        sharded, module = self._sharded_state(), cast(Any, self.lightning_module)
        finite.check(f"{filepath} is not written", finite.parameters(module.chunks), finite.DIVERGED)
        self.checkpoint_io.save_checkpoint({"sharded": sharded, "common": common}, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote, at this job's layout."""
        state = self._sharded_state(is_loading=True)
        loaded = distributed_checkpoint.load(Path(checkpoint_path), state, verify=False)  # CheckpointFolder.latest did
        loop = loaded["common"]["loops"]["fit_loop"]
        # A checkpoint of the last step says "the epoch is over"; a run with more steps goes on all the same. The names
        # are Lightning 2.4.0's (pytorch/loops). Remove both when it goes by max_steps alone.
        loop["epoch_loop.batch_progress"]["is_last_batch"] = False
        # Lightning validates again where a checkpoint was due at the same step; it must start at the first batch.
        for name in loop:
            if "val_loop" in name:
                loop[name] = _zeroed(loop[name])
        progress: dict[str, Any] = {"state_dict": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
        return {**loaded["common"], **progress, "sharded": loaded}

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load the weights into the model chunks."""
        module: Any = self.lightning_module
        module.load_training_state(checkpoint["sharded"])

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load the optimizer state."""
        module: Any = self.lightning_module
        module.optimizer.load_state_dict(checkpoint["sharded"]["optimizer"])

    def teardown(self) -> None:
        """Leave the process groups alone: the next step of the same process uses them."""
        self.precision_plugin.teardown()
        self.accelerator.teardown()

"""The model methods that Lightning calls: batches, steps and validation, run through megatron-core's schedules."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_steerlm.config import LoRAConfig, OptimizerConfig, Settings
from nemo_steerlm.megatron import checkpoint, finite, gpt, lora, optim, parallel
from nemo_steerlm.megatron.average import WeightAverage
from nemo_steerlm.megatron.layers import Segments
from nemo_steerlm.megatron.phases import Phases
from nemo_steerlm.megatron.reductions import sum_over_ranks, totals

Section = TypeVar("Section", bound=Settings)
MicroBatch = dict[str, Any]  # tensors, and on the host `real_tokens` and, of a packed row, `segments`


class _LightningOptimizer(torch.optim.Optimizer):
    """megatron-core's optimizer as a torch optimizer; Lightning counts `step` calls as global steps."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 0.0})
        self.optimizer = optimizer

    def step(self, closure: Any = None, *, norm: float | torch.Tensor | None = None) -> None:  # type: ignore[override]
        if norm is not None:  # else the step is skipped
            optim.move(self.optimizer, norm)


class TrainableModel(ModelPT):
    """The training half of `MegatronModel`: it delegates loss and metrics to the task that `begin` gives it."""

    def __init__(self, cfg: DictConfig, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.automatic_optimization = False
        self.chunks: list[gpt.LanguageModel] = []
        self.optimizer: Any = None
        self.average: WeightAverage | None = None
        self.task: Any = None
        self.training_batches: Any = None
        self.validation_batches: Any = None
        self.beside: dict[str, Any] = {}
        self.bad_steps: Any = None
        self.phases = Phases()
        self._first_step = 0

    def build(self, *, initialise: bool = True) -> None:
        """Build this rank's part of the network."""
        raise AssertionError("MegatronModel does")

    def begin(
        self,
        task: Any,
        training: Any,
        validation: Any = None,
        beside: Mapping[str, Any] | None = None,
        *,
        bad_steps: Any,
        max_steps: int | None = None,
    ) -> None:
        """Set up a training; called after the weights are loaded.

        Args:
            task: the loss and the metrics, a `train.tasks.Task` of this model.
            training, validation: `train.batches.StepBatches`.
            beside: batches that the task's metrics read at every validation, by name.
            bad_steps: checks every step, a `train.bad_steps.BadSteps`.
            max_steps: optimizer steps; None for the configuration's.
        """
        self.task, self.training_batches, self.validation_batches = task, training, validation
        self.beside, self.bad_steps = dict(beside or {}), bad_steps
        if max_steps is not None:
            self.cfg.max_steps = max_steps
        task.head_start(training)
        self._choose_trained()

    def _choose_trained(self) -> None:
        """Freeze the backbone, add adapters, average, as configured."""
        adapters = typed(LoRAConfig, self.cfg.get("lora") or {}, "model.lora")
        if adapters.rank or self.cfg.get("freeze", "none") == "trunk":
            self.freeze_trunk()
        if adapters.rank:
            lora.add(self.chunks, adapters, int(self.cfg.seed))
        decay = self._optimizer_config.ema_decay
        self.average = None if decay is None else WeightAverage(self.chunks, decay)

    def freeze_trunk(self) -> None:
        """Freeze the backbone; only parameters of the attributes are trained."""
        lora.freeze_trunk(self.chunks)

    def training_state(self) -> dict[str, Any]:
        """Sharded state of what training changes, without the optimizer's."""
        self._gather()
        average = {} if self.average is None else {"average": self.average.sharded_state()}
        return {"model": checkpoint.training_state(self.chunks), **average}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Put a loaded `training_state` back (raises CheckpointError where it is not finite)."""
        checkpoint.load_training_state(self.chunks, state["model"])
        finite.check("the checkpoint to go on from", finite.parameters(self.chunks), "resume=false starts over")
        if self.average is not None:
            self.average.load(state["average"])

    def configure_model(self) -> None:
        """Lightning's hook: build the network and put it into megatron-core's data-parallel wrapper."""
        self.build()
        if not hasattr(self, "_wrapped"):
            self._wrapped = (
                optim.wrap(self.chunks, self._optimizer_config, self.phases),
            )  # a tuple hides it from torch's registry

    def _gather(self) -> None:
        """Complete this rank's weights; nothing to do outside of a training."""
        if hasattr(self, "_wrapped"):
            optim.gather(self._wrapped[0])

    @property
    def _optimizer_config(self) -> OptimizerConfig:
        return typed(OptimizerConfig, self.cfg.optimizer, "optimizer")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's hook: megatron-core's optimizer over all chunks."""
        self.optimizer = optim.build(self._wrapped[0], self._optimizer_config)
        return _LightningOptimizer(self.optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: data goes on after the step the checkpoint was made at."""
        self._first_step = int(checkpoint["global_step"])

    def train_dataloader(self) -> Any:
        """Micro-batches of the steps still to do."""
        return self.training_batches.loader(self._first_step)

    def val_dataloader(self) -> Any:
        """Micro-batches of the validation data, every item once."""
        return self.validation_batches.loader() if self.validation_batches is not None else []

    def _forward_step(self, batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = chunk(
            batch["tokens"], None, None, places=batch.get("places"), packed_seq_params=batch["segments"]
        )  # fmt: skip
        return output, partial(self._loss, batch=batch)

    def _loss(self, output: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        total, count, kept = self.task.loss(output, batch)
        # clone: the schedule rescales the loss in place
        return total, count, {"sum": total.detach().clone(), "count": count.detach().clone(), **kept}

    def run(self, batches: list[MicroBatch], forward_only: bool) -> list[dict[str, Any]]:
        """Run one step's micro-batches through megatron-core's schedule; what the last stage kept of each.

        Only here do batches go to the device: once, however many chunks read them.
        """
        models = self._wrapped[0] if hasattr(self, "_wrapped") else self.chunks
        batches = [to_device(batch, parallel.device()) for batch in batches]
        rows, length = batches[0]["tokens"].shape
        iterators = [iter(batches) for _ in models]
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's hook: nothing, `run` does it."""
        return batch

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """One optimizer step over this rank's share of the global batch; skipped where it is not finite.

        All ranks know the total loss and the gradient norm before the optimizer steps. Only there do they wait for
        the device.

        Raises:
            DataError: too many steps in a row were not finite (`BadSteps`).
        """
        started = time.perf_counter()
        step, shim = self.trainer.global_step, self.optimizers()
        rate = optim.schedule(self.optimizer, self._optimizer_config, step, int(self.cfg.max_steps))
        # dropout is a function of (seed, step): a resumed run draws what the uninterrupted one drew
        parallel.seed_everything(int(self.cfg.seed) + step)
        for model in self._wrapped[0]:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.phases("run"):
            kept = self.run(batch, forward_only=False)
        gradients = optim.gradient_norm(self.optimizer)
        total, count, tokens, computed, norm = sum_over_ranks(
            *totals(kept),
            sum(b["real_tokens"] for b in batch),
            sum(b["tokens"].numel() for b in batch),
            on_last_stage=kept != [],
            beside=gradients,
        )
        good = self.bad_steps.judge(step + 1, total, norm, batch, kept)
        with self.phases("optimizer"):
            shim.step(norm=gradients if good else None)  # type: ignore[union-attr,call-arg]
        if good and self.average is not None:
            self._gather()
            self.average.update()
        elapsed = time.perf_counter() - started
        self.phases.add("step", elapsed)
        metrics = {
            "step": float(
                self.trainer.global_step
            ),  # optimizer steps done; Lightning's own count is off after a resume
            "train/loss": total / max(count, 1.0),
            "train/grad_norm": norm,
            "train/learning_rate": rate,
            "train/bad_steps": float(self.bad_steps.count),  # skipped since the run was started or resumed
            "train/labels": count,
            "train/tokens_per_second": tokens / elapsed,
            "train/pack_efficiency": tokens / max(computed, 1.0),  # 1 = no padding
        }
        self.trained = metrics
        # As tensors, which stay on the host: Lightning sends numbers to the device and reads them back one by one.
        self.log_dict({name: torch.tensor(value) for name, value in metrics.items()}, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Lightning's hook: reset the counts."""
        self._kept: list[dict[str, Any]] = []

    def validation_step(self, batch: list[MicroBatch], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Run one step's validation micro-batches."""
        with torch.no_grad():
            self._kept += self.run(batch, forward_only=True)

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> dict:
        """Log the validation metrics, computed over all ranks and every item once."""
        self.log("step", float(self.trainer.global_step), batch_size=1)
        self.validated = self.task.metrics(self._kept)
        for name, value in self.validated.items():
            self.log(name, value, batch_size=1)
        self._kept = []
        return {}

    def validate(self, most: int | None) -> None:
        """One validation outside of Lightning's loop, of at most so many global batches; fills `validated`."""
        self.configure_model()
        self.eval()
        with torch.no_grad():
            steps = itertools.islice(self.val_dataloader(), most)
            kept = [one for step in steps for one in self.run(step, forward_only=True)]
        self.validated = self.task.metrics(kept)

    def loss_over(self, batches: Any) -> float:
        """The loss of all of these micro-batches (`StepBatches`), summed over all ranks."""
        with torch.no_grad():
            kept = [one for step in batches.loader() for one in self.run(step, forward_only=True)]
        return sum_over_ranks(totals(kept)[0], on_last_stage=kept != [])[0]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Empty: weights travel as sharded state (`MegatronStrategy`)."""
        return {}


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch as a model reads it: its tensors on `device`, `segments` as `Segments`, also of padded rows.

    Copies do not wait for the device; the loader's tensors are in memory that allows it.
    """
    moved = {name: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    return {**moved, "segments": Segments(batch.get("segments") or [batch["tokens"].shape[1]], device)}


def typed(cls: type[Section], values: Any, key: str) -> Section:
    """A section of a model's configuration as its dataclass, valid.

    Args:
        key: of the section, for messages.

    Raises:
        ConfigError: as its `validate`.
    """
    section: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    section.validate(f"{key}.")
    return section

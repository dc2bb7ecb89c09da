"""What both SteerLM models share: a megatron-core GPT in a NeMo model, trained through megatron-core's schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import Architecture, LoRAConfig, OptimizerConfig, ParallelConfig, check_inference
from nemo_steerlm.data.units import EMPTY
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import checkpoint, finite, gpt, lora, optim, parallel
from nemo_steerlm.megatron.average import WeightAverage
from nemo_steerlm.megatron.parallel import resolve_precision
from nemo_steerlm.models.bad_steps import BadSteps
from nemo_steerlm.models.batches import MicroBatch, StepBatches, loader, to_device
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # fp8: the matrix products alone
Model = TypeVar("Model", bound="MegatronModel")


class _LightningOptimizer(torch.optim.Optimizer):
    """megatron-core's optimizer as Lightning wants to see one; Lightning counts `step` calls as global steps."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 0.0})
        self.optimizer = optimizer

    def step(self, closure: Any = None, *, norm: float | torch.Tensor | None = None) -> None:  # type: ignore[override]
        if norm is not None:  # else the step is skipped
            optim.move(self.optimizer, norm)


class MegatronModel(ModelPT):
    """A megatron-core GPT as a NeMo model.

    Args:
        cfg: `architecture`, `template`, `attributes` (a schema's dict, or null), `head` and `pooling` of a regressor,
            `ends` (more ids at which a text ends), `parallel`, `precision` ("fp32", "bf16" or "fp8"), and for training
            `optimizer`, `max_steps`, `seed`, `recompute`, `lora` and `freeze`.
        tokenizer: what the model reads and writes with.
        trainer: Lightning's trainer with `MegatronStrategy`, or None for inference.
    """

    kind: ClassVar[str]

    def __init__(self, cfg: DictConfig, tokenizer: Tokenizer, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.automatic_optimization = False
        self.card = ModelCard(
            kind=self.kind,
            architecture=_typed(Architecture, cfg.architecture),
            template=PromptTemplate.from_dict(_mapping(cfg.template)),
            schema=None if cfg.get("attributes") is None else AttributeSchema.load(_mapping(cfg.attributes)),
            ends=tuple(cfg.get("ends") or ()),
            **{key: cfg[key] for key in ("head", "pooling") if key in cfg},
        )
        self.tokenizer = tokenizer
        self.parallel = _typed(ParallelConfig, cfg.get("parallel") or {})
        self.chunks: list[gpt.LanguageModel] = []
        self.optimizer: Any = None
        self.average: WeightAverage | None = None
        self.training_batches: StepBatches | None = None
        self.validation_batches: StepBatches | None = None
        self.beside: dict[str, StepBatches] = {}  # what a model's own validation metrics read, by name
        self.bad_steps = BadSteps()
        self._first_step = 0

    # ---------------------------------------------------------------- construction

    @property
    def schema(self) -> AttributeSchema:
        """The attributes this model knows."""
        assert self.card.schema is not None
        return self.card.schema

    @property
    def outputs(self) -> int | None:
        """Size of the regression head, None for a language model."""
        return None

    def build(self, *, initialise: bool = True) -> None:
        """Build this rank's part of the network; idempotent.

        Args:
            initialise: draw random weights; without, only a new head has values and the caller loads the others.
        """
        if not self.chunks:
            parallel.initialize(self.parallel, seed=int(self.cfg.get("seed", 1234)))
            precision = self.cfg.precision
            self.chunks = gpt.build(
                self.card.architecture, self.parallel, DTYPES[precision], self.outputs,
                fp8=precision == "fp8", recompute=self.cfg.get("recompute", "none"), initialise=initialise,
            )  # fmt: skip
            self.network = torch.nn.ModuleList(self.chunks)

    def load_weights(self, folder: Path | str) -> None:
        """Take the weights of a model folder; a head that the folder does not have keeps its initial values."""
        self.build(initialise=False)
        model_folder.load_weights(folder, self.chunks, skip=self.fresh_parameters(model_folder.read(folder)))

    def fresh_parameters(self, source: ModelCard) -> tuple[str, ...]:
        """Names (prefixes) of the parameters that a model folder of this kind does not provide."""
        return ()

    @classmethod
    def from_pretrained(
        cls: type[Model], path: Path | str, *, parallel: ParallelConfig | None = None, precision: str | None = None
    ) -> Model:
        """Load a model folder (or a `.nemo` archive of one) for inference, at any layout.

        The precision is "fp32" or "bf16"; None: bf16 on a GPU, fp32 on a CPU.

        Sequence parallelism and virtual stages help training only: a layout that has them is used without.

        Raises:
            CheckpointError: the folder is missing, damaged or of another kind.
            ConfigError: a precision that only trainings have.
        """
        check_inference(precision)
        path = Path(path)
        if path.suffix == ".nemo" and path.is_file():
            return cls.restore_from(path, parallel=parallel, precision=precision)
        card = model_folder.read(path)
        cls.check_kind(card, path)
        if parallel is not None:
            parallel = dataclasses.replace(parallel, sequence=False, virtual_pipeline=None)
        cfg = model_config(card, parallel=parallel, precision=precision)
        model = cls.variant(card)(cfg, model_folder.read_tokenizer(path))
        model.load_weights(path)
        return model.eval()

    @classmethod
    def variant(cls, card: ModelCard) -> type[Any]:
        """The class that makes a model of this card: this one or a child."""
        return cls

    @classmethod
    def check_kind(cls, card: ModelCard, path: Path) -> None:
        """Refuse a model folder of another kind, saying which verb makes the right one."""
        if card.kind != cls.kind:
            raise CheckpointError(
                f"{path}: this is a {card.kind.replace('_', ' ')}, expected a {cls.kind.replace('_', ' ')}"
            )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a model folder, of the averaged weights where they are kept, by all ranks together."""
        self._gather()
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            model_folder.write(folder, self.card, self.tokenizer, self.chunks)

    def save_to(self, save_path: str) -> None:
        """Write the model folder as one `.nemo` archive (an uncompressed tar); all ranks call it."""
        target = Path(save_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(target.name + ".folder")
        self.save_pretrained(folder)
        if parallel.is_rank_zero():
            import shutil

            partial = target.with_name(target.name + ".unfinished")
            with tarfile.open(partial, "w") as archive:
                archive.add(folder, arcname=".")
            partial.replace(target)
            shutil.rmtree(folder)
        parallel.barrier()

    @classmethod
    def restore_from(cls: type[Model], restore_path: Path | str, **kwargs: Any) -> Model:  # type: ignore[override]
        """Load what `save_to` wrote; keyword arguments as in `from_pretrained`."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                with tarfile.open(restore_path, "r:") as archive:  # not packed, so it unpacks to no more than its size
                    if sparse := [member.name for member in archive if member.issparse()]:
                        raise tarfile.TarError(f"{sparse[0]} is a sparse file")
                    archive.extractall(folder, filter="data")
            except (tarfile.TarError, OSError) as error:
                raise CheckpointError(f"{restore_path}: not a .nemo archive of this version: {error}") from error
            return cls.from_pretrained(folder, **kwargs)

    @classmethod
    def list_available_models(cls) -> list:
        """No weights are published."""
        return []

    def setup_training_data(self, train_data_config: Any) -> None:
        """Batches are given by `training_batches`."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Batches are given by `validation_batches`."""

    def close(self) -> None:
        """Give back the memory of weights, gradients and optimizer; the model is of no use afterwards.

        Needed where another model follows in the same process: what a training leaves behind refers to itself in
        circles, one of them through autograd's nodes, which Python's collector does not see through.
        """
        for wrapped in self._wrapped[0] if hasattr(self, "_wrapped") else []:
            vars(wrapped).clear()  # breaks that circle: it holds the nodes whose hooks hold it
        self.chunks, self.optimizer, self.average = [], None, None
        self.training_batches = self.validation_batches = self._trainer = None  # Lightning's trainer has the optimizer
        self.beside = {}
        for name in ("network", "_wrapped"):
            if hasattr(self, name):
                delattr(self, name)
        gc.collect()
        torch.cuda.empty_cache()  # nothing without CUDA

    # ---------------------------------------------------------------- training

    def choose_trained(self) -> None:
        """Freeze the backbone, add adapters, average, as configured; to be called once the weights are loaded."""
        adapters = _typed(LoRAConfig, self.cfg.get("lora") or {})
        if adapters.rank or self.cfg.get("freeze", "none") == "trunk":
            self.freeze_trunk()
        if adapters.rank:
            lora.add(self.chunks, adapters, int(self.cfg.seed))
        decay = self._optimizer_config.ema_decay
        self.average = None if decay is None else WeightAverage(self.chunks, decay)

    def freeze_trunk(self) -> None:
        """Leave only what belongs to the attributes to be trained."""
        lora.freeze_trunk(self.chunks)

    def training_state(self) -> dict[str, Any]:
        """Sharded state of what training changes, the optimizer's aside."""
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
                optim.wrap(self.chunks, self._optimizer_config),
            )  # a tuple hides it from torch's registry

    def _gather(self) -> None:
        """Complete this rank's weights; nothing to do outside of a training."""
        if hasattr(self, "_wrapped"):
            optim.gather(self._wrapped[0])

    @property
    def _optimizer_config(self) -> OptimizerConfig:
        return _typed(OptimizerConfig, self.cfg.optimizer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's hook: megatron-core's optimizer over all chunks."""
        self.optimizer = optim.build(self._wrapped[0], self._optimizer_config)
        return _LightningOptimizer(self.optimizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: data goes on after the step the checkpoint was made at."""
        self._first_step = int(checkpoint["global_step"])

    def train_dataloader(self) -> Any:
        """Micro-batches of the steps still to do."""
        assert self.training_batches is not None
        return loader(self.training_batches, self._first_step)

    def val_dataloader(self) -> Any:
        """Micro-batches of the validation data, every item once."""
        return loader(self.validation_batches) if self.validation_batches is not None else []

    def forward_loss(
        self, output: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Loss of one micro-batch on the last pipeline stage: sum, count, and what to keep for metrics."""
        raise AssertionError("each model has its own")

    def _forward_step(self, batches: Iterator[MicroBatch], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        output = chunk(
            batch["tokens"], None, None, places=batch.get("places"), packed_seq_params=batch["segments"]
        )  # fmt: skip
        return output, partial(self._loss, batch=batch)

    def _loss(self, output: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        total, count, kept = self.forward_loss(output, batch)
        # clone: the schedule rescales the loss in place
        return total, count, {"sum": total.detach().clone(), "count": count.detach().clone(), **kept}

    def run(self, batches: list[MicroBatch], forward_only: bool) -> list[dict[str, Any]]:
        """Run one step's micro-batches through megatron-core's schedule; what the last stage kept of each.

        The one place where batches go to the device: once, whoever runs them and however many chunks read them.
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

        All ranks know the whole loss and gradient norm before the optimizer moves. They wait for the device there,
        and only there.

        Raises:
            DataError: so many steps in a row were not finite (`BadSteps`).
        """
        started = time.perf_counter()
        step, shim = self.trainer.global_step, self.optimizers()
        rate = optim.schedule(self.optimizer, self._optimizer_config, step, int(self.cfg.max_steps))
        # dropout is a function of (seed, step): a resumed run draws what the uninterrupted one drew
        parallel.seed_everything(int(self.cfg.seed) + step)
        for model in self._wrapped[0]:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
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
        shim.step(norm=gradients if good else None)  # type: ignore[union-attr,call-arg]
        if good and self.average is not None:
            self._gather()
            self.average.update()
        elapsed = time.perf_counter() - started
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
        """Lightning's hook: start counting afresh."""
        self._kept: list[dict[str, Any]] = []

    def validation_step(self, batch: list[MicroBatch], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Run one step's validation micro-batches."""
        with torch.no_grad():
            self._kept += self.run(batch, forward_only=True)

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> dict:
        """Log the validation metrics, computed over all ranks and every item once."""
        self.log("step", float(self.trainer.global_step), batch_size=1)
        self.validated = self.validation_metrics(self._kept)
        for name, value in self.validated.items():
            self.log(name, value, batch_size=1)
        self._kept = []
        return {}

    def validation_metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics by name from what `forward_loss` kept of all validation micro-batches."""
        total, count = sum_over_ranks(*totals(kept), on_last_stage=kept != [])
        return {"val/loss": total / max(count, 1.0)}

    def loss_over(self, batches: StepBatches) -> float:
        """The loss of all of these micro-batches, summed over all ranks."""
        with torch.no_grad():
            kept = [one for step in loader(batches) for one in self.run(step, forward_only=True)]
        return sum_over_ranks(totals(kept)[0], on_last_stage=kept != [])[0]

    def metric_names(self) -> list[str]:
        """What `validation_metrics` gives for all data together."""
        return ["val/loss"]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Empty: weights travel as sharded state (`MegatronStrategy`)."""
        return {}


def totals(kept: list[dict[str, Any]]) -> tuple[float | torch.Tensor, float | torch.Tensor]:
    """Sum and count over what the last stage kept of all micro-batches, on the device; 0 on the other stages."""
    if not kept:
        return 0.0, 0.0
    total, count = (torch.stack([k[name] for k in kept]).double().sum() for name in ("sum", "count"))
    return total, count


def sum_over_ranks(
    *values: float | torch.Tensor, on_last_stage: bool, beside: float | torch.Tensor | None = None
) -> list[float]:
    """Sum numbers over data-parallel ranks; every rank gets the sums.

    Only the last pipeline stage knows losses (`on_last_stage`), and tensor-parallel ranks all know the same ones.
    Waits for the device once: a number that every rank knows already is read together with the sums, as `beside`.
    Where it is not finite on one rank, all get a NaN.
    """
    table = torch.zeros(len(values) + (beside is not None), dtype=torch.float64, device=parallel.device())
    if on_last_stage:
        for place, value in enumerate(values):
            table[place] = value
        table /= parallel_state.get_tensor_model_parallel_world_size()
    if beside is not None:
        table[-1] = beside * 0  # a NaN where it is not finite
    dist.all_reduce(table)
    if beside is not None:
        table[-1:] += beside
    return table.tolist()


def rows_over_ranks(indices: list[torch.Tensor], rows: list[torch.Tensor], width: int) -> np.ndarray:
    """Rows that ranks hold, each under the index of its sample, as one table on every rank.

    Args:
        indices: of the samples, `[n]` each, `EMPTY` for none; empty lists on a rank that holds no rows.
        rows: what belongs to them, `[n, width]` each.
        width: columns.

    Returns:
        float64 `[samples, width]` in the order of the indices: the same for every layout.
    """
    index = torch.cat(indices) if indices else torch.full((1,), EMPTY, device=parallel.device())
    last = index.max()
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    table = torch.zeros(int(last) + 1, 1 + width, dtype=torch.float64, device=parallel.device())
    if rows and parallel_state.get_tensor_model_parallel_rank() == 0:  # tensor-parallel ranks all know the same rows
        real = index != EMPTY
        table[index[real], 0] = 1.0
        table[index[real], 1:] = torch.cat(rows)[real].double()
    dist.all_reduce(table)  # one rank's values and zeros: exact
    assert not (table[:, 0] > 1).any(), "a sample was validated twice"
    return table[table[:, 0] > 0, 1:].cpu().numpy()


def model_config(
    card: ModelCard, *, parallel: ParallelConfig | None = None, precision: str | None = None, **training: Any
) -> DictConfig:
    """The NeMo configuration of a model with this card; `training` adds `optimizer`, `max_steps`, `seed`.

    Args:
        precision: None: as `parallel.resolve_precision` chooses.
    """
    return OmegaConf.create(
        {
            "architecture": OmegaConf.to_container(OmegaConf.structured(card.architecture)),
            "template": card.template.to_dict(),
            "attributes": None if card.schema is None else card.schema.to_dict(),
            "head": card.head,
            "pooling": card.pooling,
            "ends": list(card.ends),
            "parallel": OmegaConf.to_container(OmegaConf.structured(parallel or ParallelConfig())),
            "precision": resolve_precision(precision),
            **training,
        }
    )


def _typed(cls: type, values: Any) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))


def _mapping(values: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(values)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}

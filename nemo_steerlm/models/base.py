"""Base of both SteerLM models: a megatron-core GPT in a NeMo model, trained through megatron-core's schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tarfile
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_steerlm import hub
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import Architecture, ParallelConfig, check_inference
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import dtypes, gpt, parallel
from nemo_steerlm.megatron.parallel import resolve_precision
from nemo_steerlm.models.training import TrainableModel, typed
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

Model = TypeVar("Model", bound="MegatronModel")


class MegatronModel(TrainableModel):
    """A megatron-core GPT as a NeMo model.

    Args:
        cfg: `architecture`, `template`, `attributes` (a schema's dict, or null), `head` and `pooling` of a regressor,
            `ends` (further end-of-text ids), `parallel`, `precision` ("fp32", "bf16" or "fp8"), and for training
            `optimizer`, `max_steps`, `seed`, `recompute`, `lora` and `freeze`.
        tokenizer: the model's tokenizer.
        trainer: Lightning's trainer with `MegatronStrategy`, or None for inference.
    """

    kind: ClassVar[str]

    def __init__(self, cfg: DictConfig, tokenizer: Tokenizer, trainer: Any = None) -> None:
        super().__init__(cfg, trainer)
        self.card = ModelCard(
            kind=self.kind,
            architecture=typed(Architecture, cfg.architecture, "architecture"),
            template=PromptTemplate.from_dict(_mapping(cfg.template)),
            schema=None if cfg.get("attributes") is None else AttributeSchema.load(_mapping(cfg.attributes)),
            ends=tuple(cfg.get("ends") or ()),
            **{key: cfg[key] for key in ("head", "pooling") if key in cfg},
        )
        self.tokenizer = tokenizer
        self.parallel = typed(ParallelConfig, cfg.get("parallel") or {}, "parallel")

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
            initialise: draw random weights; else only a new head is initialised and the caller loads the rest.
        """
        if not self.chunks:
            parallel.initialize(self.parallel, seed=int(self.cfg.get("seed", 1234)))
            precision = self.cfg.precision
            self.chunks = gpt.build(
                self.card.architecture, self.parallel, dtypes.PRECISIONS[precision], self.outputs,
                fp8=precision == "fp8", recompute=self.cfg.get("recompute", "none"), initialise=initialise,
            )  # fmt: skip
            self.network = torch.nn.ModuleList(self.chunks)

    def load_weights(self, folder: Path | str) -> None:
        """Load the weights of a model folder; a head that the folder does not have keeps its initial values."""
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

        The path may be a name on the Hugging Face hub, `OWNER/NAME` or `OWNER/NAME@REVISION` (`hub.folder`).

        The precision is "fp32" or "bf16"; None: bf16 on a GPU, fp32 on a CPU.

        Sequence parallelism and virtual stages are for training only and dropped from the layout.

        Raises:
            CheckpointError: the folder is missing, damaged or of another kind.
            ConfigError: a precision that is for training only.
        """
        check_inference(precision)
        path = hub.folder(path)
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
        """The class for a model with this metadata: this one or a subclass."""
        return cls

    @classmethod
    def check_kind(cls, card: ModelCard, path: Path) -> None:
        """Refuse a model folder of another kind, saying which verb makes the right one."""
        if card.kind != cls.kind:
            raise CheckpointError(
                f"{path}: this is a {card.kind.replace('_', ' ')}, expected a {cls.kind.replace('_', ' ')}"
            )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a model folder, with the averaged weights where they are kept; all ranks call it."""
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
                with tarfile.open(restore_path, "r:") as archive:  # uncompressed: extracts to no more than its size
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
        """Free the memory of weights, gradients and optimizer; the model is unusable afterwards.

        Needed where another model follows in the same process: a training leaves reference cycles, one of them
        through autograd's nodes, which Python's garbage collector does not see.
        """
        for wrapped in self._wrapped[0] if hasattr(self, "_wrapped") else []:
            vars(wrapped).clear()  # breaks that cycle: it holds the nodes whose hooks hold it
        self.chunks, self.optimizer, self.average = [], None, None
        self.task = self.training_batches = self.validation_batches = None
        self.beside, self._trainer = {}, None  # Lightning's trainer has the optimizer
        for name in ("network", "_wrapped"):
            if hasattr(self, name):
                delattr(self, name)
        gc.collect()
        torch.cuda.empty_cache()  # nothing without CUDA


def model_config(
    card: ModelCard, *, parallel: ParallelConfig | None = None, precision: str | None = None, **training: Any
) -> DictConfig:
    """The NeMo configuration of a model with this metadata; `training` adds `optimizer`, `max_steps`, `seed`.

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


def _mapping(values: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(values)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}

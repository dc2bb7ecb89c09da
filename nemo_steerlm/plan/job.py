"""What is planned: a model, a layout and a batch, read from a verb's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import Architecture, LoRAConfig, ParallelConfig, TrainConfig, TrainRegressorConfig
from nemo_steerlm.config.families import Family, family_of
from nemo_steerlm.config.layout import padded_vocabulary, stage_layers
from nemo_steerlm.plan.tokens import Data


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, as far as memory and time depend on it.

    Attributes:
        architecture: of the model; the vocabulary's size is known.
        outputs: of a regression head, None for a language model.
        parallel: the layout.
        nodes, devices: machines, and GPUs of each.
        width: bytes of a number: 2 for bf16, 4 for fp32.
        trained: "all"; "lora": adapters; "head": a regression head alone; "tokens": embeddings of attribute tokens.
        lora: the adapters, of rank 0 without them.
        attribute_tokens: trained token embeddings beside a frozen vocabulary, at most: a policy's tokenizer may split
            attribute strings.
        rows, length: rows of a micro-batch and their tokens.
        packed: whether several samples share a row.
        batch: samples of a global batch.
        sample: mean tokens of a sample.
        texts: rows of a sample without packing: 2 where it is a preference.
        padding: share of padding in the rows without packing.
        loss_share: share of the tokens whose logits are computed; not used with a regression head.
        recompute: a value of `trainer.recompute`.
        distributed: whether the optimizer's state is shared by the data-parallel ranks.
        averaged: whether a moving average of the weights is kept.
        background: whether checkpoints are written in the background.
    """

    architecture: Architecture
    outputs: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    nodes: int = 1
    devices: int = 1
    width: int = 2
    trained: str = "all"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    attribute_tokens: int = 0
    rows: int = 1
    length: int = 4096
    packed: bool = False
    batch: int = 128
    sample: float = 4096.0
    texts: int = 1
    padding: float = 0.0
    loss_share: float = 1.0
    recompute: str = "none"
    distributed: bool = True
    averaged: bool = False
    background: bool = False

    @property
    def family(self) -> Family:
        """The traits of the model's family."""
        return family_of(self.architecture)

    @property
    def world(self) -> int:
        """All GPUs."""
        return self.nodes * self.devices

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline)

    @property
    def tokens(self) -> int:
        """Most tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def computed(self) -> float:
        """Tokens of a micro-batch on average, padding included; rows are as long as their samples need."""
        return self.batch * self.sample / (1 - self.padding) / self.ranks / self.micro_batches

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on one tensor-parallel rank."""
        return padded_vocabulary(self.architecture) // self.parallel.tensor

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank in a step.

        Packed rows are taken to be full: `train.packing.pack` needs as many, or a few more.
        """
        rows = self.batch * (self.sample / self.length if self.packed else self.texts)
        parts = self.ranks * self.rows * (self.parallel.pipeline if self.parallel.virtual_pipeline else 1)
        return max(1, -int(-rows // parts)) * (self.parallel.pipeline if self.parallel.virtual_pipeline else 1)

    def stages(self) -> list[Stage]:
        """The pipeline stages, in order."""
        layers = stage_layers(self.architecture, self.parallel)
        return [Stage(self, index, count) for index, count in enumerate(layers)]


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a job, as one of its tensor-parallel ranks sees it."""

    job: Job
    index: int
    layers: int

    @property
    def first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it has the final norm and the head."""
        return self.index == self.job.parallel.pipeline - 1

    @property
    def chunk(self) -> float:
        """Layers of one model chunk."""
        return self.layers / (self.job.parallel.virtual_pipeline or 1)

    @property
    def in_flight(self) -> int:
        """Chunks whose activations are kept at once, most of the time.

        1F1B keeps one for each later stage and the current one; the interleaved schedule (arXiv 2104.04473, section
        2.2; megatron-core's `get_pp_rank_microbatches`) twice as many and those of its other chunks.
        """
        parallel = self.job.parallel
        chunks, later = parallel.virtual_pipeline or 1, parallel.pipeline - 1 - self.index
        warm_up = later if chunks == 1 else 2 * later + (chunks - 1) * parallel.pipeline
        return min(warm_up + 1, self.job.micro_batches * chunks)


def training_job(config: TrainConfig, architecture: Architecture, data: Data | None = None) -> Job:
    """The job of a training's configuration.

    Args:
        config: of `train-sft` or `train-regressor`.
        architecture: of the model.
        data: the data set; None: every sample is as long as a row, and every token carries loss.
    """
    trainer, model = config.trainer, config.model
    rank, length = model.lora.rank, config.data.max_length
    schema = config.attributes.load()
    regressor = config if isinstance(config, TrainRegressorConfig) else None
    generative = regressor is not None and regressor.head == "generative"
    outputs = None if regressor is None or generative else _outputs(regressor.head or "regression", schema)
    trained = "lora" if rank else "all"
    if model.freeze == "trunk":
        trained = "tokens" if outputs is None else "head"
    # a preference is one sample of two texts
    pair = 1 if regressor is None or regressor.loss.preference == "none" else 2
    sample = pair * (length if data is None else data.tokens / data.samples)
    loss_share = 1.0 if data is None else data.loss_share
    if generative:  # an attribute string has about four tokens an attribute: name, colon, value, comma
        loss_share = min(1.0, 4 * len(schema or range(9)) / sample)
    layout = config.parallel
    return Job(
        architecture=architecture, outputs=outputs, trained=trained, loss_share=loss_share, sample=sample, texts=pair,
        parallel=ParallelConfig(
            tensor=layout.tensor, pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline,
            sequence=layout.sequence,
        ),
        nodes=trainer.num_nodes,
        devices=trainer.devices,
        width=4 if trainer.precision == "fp32" else 2,
        lora=LoRAConfig(rank=rank, dropout=model.lora.dropout, targets=list(model.lora.targets)),
        attribute_tokens=0 if regressor or trained == "all" else sum(a.high - a.low + 1 for a in schema or ()),
        rows=1 if config.data.packing else trainer.micro_batch_size * pair,
        length=(config.data.pack_length or length) if config.data.packing else length,
        packed=config.data.packing,
        batch=trainer.global_batch_size,
        padding=0.0 if config.data.packing or data is None else data.padding,
        recompute=trainer.recompute,
        distributed=config.optimizer.distributed,
        averaged=config.optimizer.ema_decay is not None,
        background=trainer.async_checkpoint,
    )  # fmt: skip


def inference_job(config: Any, architecture: Architecture, sample: float, outputs: int | None = None) -> Job:
    """The job of a verb that reads or generates; see `training_job`. Sequence parallelism is for trainings only."""
    trainer, layout = config.trainer, config.parallel
    return Job(
        architecture=architecture, outputs=outputs, sample=sample, nodes=trainer.num_nodes, devices=trainer.devices,
        parallel=ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline),
        width=4 if trainer.precision == "fp32" else 2, batch=1,
    )  # fmt: skip


def _outputs(head: str, schema: AttributeSchema | None) -> int:
    """Raw outputs of a regression head (`models.heads`); without a schema those of HelpSteer's and OASST's nine."""
    if schema is None:
        return 9
    levels = sum(attribute.high - attribute.low + 1 for attribute in schema)
    return {"regression": len(schema), "ordinal": levels - len(schema), "distribution": levels}[head]


def with_micro_batches(job: Job, count: int) -> Job:
    """The job with another global batch, of so many micro-batches on each rank."""
    rows = count * job.ranks * job.rows
    return replace(job, batch=int(rows * job.length / job.sample) if job.packed else rows // job.texts)


def with_layout(job: Job, **changes: Any) -> Job:
    """The job at another layout: fields of `ParallelConfig`, `rows` and `recompute`."""
    own = {key: changes.pop(key) for key in ("rows", "recompute", "distributed") if key in changes}
    return replace(job, parallel=replace(job.parallel, **changes), **own)

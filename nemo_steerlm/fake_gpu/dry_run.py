"""What a step of a configuration takes on one rank: the true step, at full size, on fake CUDA tensors.

No file of the user is needed: neither data nor weights, and of the model only its architecture. All bytes are measured
allocation: the CUDA context, NCCL's buffers and workspaces of kernels are not in it (see `nemo_steerlm.fake_gpu`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_steerlm.config import (
    AnnotateConfig,
    Architecture,
    GenerateConfig,
    ParallelConfig,
    SampleConfig,
    TrainConfig,
    TrainRegressorConfig,
)
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.fake_gpu.room import Room


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank's step. Bytes are those of GPU memory.

    Attributes:
        stage: its pipeline stage.
        parameters: numbers of this rank, with head and adapters.
        trained: those of them that are trained.
        peak: the most bytes at any time of the second step, which has the optimizer's state.
        parts: bytes by part at that time, their sum is `peak`: "parameters", "gradient buffers", "optimizer",
            "average" (of the weights), "activations", and "other".
        resting: bytes by part between two steps.
        saving: the most bytes while a checkpoint's state is collected.
        sent: bytes given to collectives in one step, by operation.
        waits: where the host waits for the device in one step, and how often.
        assumed: where a mask of unknown values was taken to choose all rows.
        micro_batches: how many the step ran.
        seconds: how long measuring took.
    """

    stage: int
    parameters: int
    trained: int
    peak: int
    parts: dict[str, int]
    resting: dict[str, int]
    saving: int
    sent: dict[str, int]
    waits: dict[str, int]
    assumed: dict[str, int]
    micro_batches: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MeasuredInference:
    """One rank's reading or generation. Bytes are those of GPU memory.

    Attributes:
        stage: its pipeline stage.
        parameters: numbers of this rank.
        rows: texts of the forward pass, or rows that decode together: those asked for, or the slots that fit.
        peak: the most bytes at any time.
        parts: bytes by part at that time, their sum is `peak`: "parameters" and "inference", caches and activations.
        sent: bytes given to collectives, by operation.
        waits: where the host waits for the device, and how often.
        seconds: how long measuring took.
    """

    stage: int
    parameters: int
    rows: int
    peak: int
    parts: dict[str, int]
    sent: dict[str, int]
    waits: dict[str, int]
    seconds: float


def measure(room: Room, config: TrainConfig, *, stage: int = 0, loss_share: float = 1.0) -> Measured:
    """Measure two training steps of the first rank of a pipeline stage.

    Rows are full: packed ones of `data.row_length()` tokens, else `trainer.micro_batch_size` samples of
    `data.max_length`. The step runs as many micro-batches as the stage needs to reach its peak: with P stages P less
    the number of the stage, with virtual stages 2 P, and no more than the global batch has.

    Args:
        config: of `train-sft` or `train-regressor`; its files need not exist, `validate` is not called. The shape is
            `model.architecture` where there is one, else that of the folder `model.init`.
        stage: counted from 0.
        loss_share: share of a policy's tokens that carry loss, the last ones of each sample. At 1, the most a step can
            take, logits are computed for all positions.

    Raises:
        ConfigError: no shape, no such stage, fp8, or there can be no fake GPU here.
        JobFailed: the step raised.
    """
    model = config.model
    _check_stage(config.parallel, stage)
    if config.trainer.precision == "fp8":
        raise ConfigError(
            "trainer.precision=fp8 cannot be measured without a GPU: its kernels are Transformer Engine's; use bf16"
        )
    if model.architecture is None and not (model.init and Path(model.init).is_dir()):
        raise ConfigError(
            "the model has no shape to measure; give one (model=llama2_13b), or a folder that exists as model.init"
        )
    verb = "train-regressor" if isinstance(config, TrainRegressorConfig) else "train-sft"
    return Measured(**_run(room, "rank", config, verb=verb, stage=stage, loss_share=loss_share))


def measure_inference(
    room: Room,
    config: AnnotateConfig | SampleConfig | GenerateConfig,
    architecture: Architecture,
    *,
    stage: int = 0,
    head: str = "regression",
    longest: int | None = None,
) -> MeasuredInference:
    """Measure one full forward pass of `annotate`, or the generation of full rows, by the first rank of a stage.

    Args:
        config: of the verb; its files need not exist, `validate` is not called.
        architecture: of the model in its checkpoint, `vocab_size` included.
        stage: counted from 0.
        head: of the regressor.
        longest: tokens of a text, or of a row with its response; None: all that the model is meant for.

    Raises:
        ConfigError: no such stage, or there can be no fake GPU here.
        JobFailed: it raised.
    """
    _check_stage(config.parallel, stage)
    verb = {AnnotateConfig: "annotate", SampleConfig: "sample", GenerateConfig: "generate"}[type(config)]
    shape = OmegaConf.to_container(OmegaConf.structured(architecture))
    longest = longest or architecture.max_position_embeddings
    job = dict(verb=verb, shape=shape, stage=stage, head=head, longest=longest)
    return MeasuredInference(**_run(room, "inference", config, **job))


def _check_stage(layout: ParallelConfig, stage: int) -> None:
    if not 0 <= stage < layout.pipeline:
        raise ConfigError(f"stage {stage}: parallel.pipeline={layout.pipeline} has stages 0 to {layout.pipeline - 1}")


def _run(room: Room, module: str, config: Any, **job: Any) -> dict[str, Any]:
    """The fields that `measure` of a module of this folder finds, and the seconds it took."""
    started = time.perf_counter()
    world = config.trainer.num_nodes * config.trainer.devices
    found = room.run(
        f"nemo_steerlm.fake_gpu.{module}:measure",
        rank=job["stage"] * (world // config.parallel.pipeline),
        world=world,
        timeout=1800.0,
        settings=OmegaConf.to_container(OmegaConf.structured(config)),
        **job,
    )
    return {**found, "seconds": time.perf_counter() - started}

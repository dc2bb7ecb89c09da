"""Processes: their number, number format and parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig(Settings):
    """The layout of a model; the remaining factor of the processes is data-parallel."""

    tensor: int = option(1, "tensor-parallel size", least=1)
    pipeline: int = option(1, "pipeline-parallel size", least=1)
    virtual_pipeline: int | None = option(None, "model chunks a pipeline stage (interleaved schedule)", least=2)
    sequence: bool = option(False, "also split norms and dropout along the sequence; needs tensor > 1")
    context: int = option(1, "processes that share each sequence; above 1 is not supported", least=1)

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the parallel sizes fit together."""
        super().validate(prefix)
        if self.context > 1:
            raise ConfigError(
                f"parallel.context={self.context} needs the ring attention of Transformer Engine, which these layers "
                "do not use yet; use parallel.tensor with parallel.sequence=true"
            )
        if self.virtual_pipeline and self.pipeline == 1:
            raise ConfigError("parallel.virtual_pipeline needs parallel.pipeline of at least 2")
        if self.sequence and self.tensor == 1:
            raise ConfigError("parallel.sequence=true needs parallel.tensor of at least 2")


@dataclass(kw_only=True)
class ProcessesConfig(Settings):
    """Processes."""

    devices: int = option(1, "processes on each node, one per GPU (or per share of the CPU)", least=1)
    num_nodes: int = option(1, "machines; more than one needs torchrun or srun", least=1)
    accelerator: str = option("auto", "where to run", choices=("auto", "cpu", "gpu"))
    timeout_minutes: float = option(30.0, "minutes a process waits for the others before the run fails", least=0.01)
    verify: bool = option(True, "check model files against the sha256 list in their folder; false = skip the check")


@dataclass(kw_only=True)
class ComputeConfig(ProcessesConfig):
    """Processes, number format and GPU."""

    precision: str | None = option(
        None, "number format of the computation; null = bf16 on a GPU, fp32 on a CPU; fp8 needs Transformer Engine",
        choices=("fp32", "bf16", "fp8"),
    )  # fmt: skip
    gpu: str | None = option(
        None, "the GPU that the layout is for, whose memory and speed `plan` reads; null = any", choices=tuple(GPUS)
    )

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the GPU has the number format."""
        super().validate(prefix)
        if self.precision == "fp8" and self.gpu is not None and not GPUS[self.gpu].fp8:
            raise ConfigError(
                f"{prefix}precision=fp8: {GPUS[self.gpu].label} ({prefix}gpu={self.gpu}) has none; use "
                f"{prefix}precision=bf16"
            )


class InProcesses(Settings):
    """Checks of a verb that starts processes."""

    trainer: ProcessesConfig
    parallel: ParallelConfig

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and `check_processes`."""
        super().validate(prefix)
        self.check_processes()

    def check_processes(self) -> None:
        """Refuse a layout that does not divide the processes (ConfigError)."""
        trainer, parallel = self.trainer, self.parallel
        world, model = trainer.num_nodes * trainer.devices, parallel.tensor * parallel.pipeline
        if world % model:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices} is {world}, expected a"
                f" multiple of parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} = {model}"
            )


class Inference(InProcesses):
    """Checks of a verb that runs inference."""

    trainer: ComputeConfig

    def validate(self, prefix: str = "") -> None:
        """As `InProcesses.validate`, and that the number format is one for inference."""
        super().validate(prefix)
        check_inference(self.trainer.precision)


def check_inference(precision: str | None) -> None:
    """Refuse a number format that is unknown or for training only (ConfigError)."""
    ComputeConfig.check_values(precision=precision)
    if precision == "fp8":
        raise ConfigError(
            "trainer.precision=fp8 is for train-regressor and train-sft; reading and generating do not compute in fp8 "
            "yet: use trainer.precision=bf16"
        )

"""Processes: how many, in which number format, and how a model is cut over them."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_steerlm.config.fields import option


@dataclass(kw_only=True)
class ParallelConfig:
    """How a model is cut; what is left of the processes is data-parallel."""

    tensor: int = option(1, "tensor-parallel size", least=1)
    pipeline: int = option(1, "pipeline-parallel size", least=1)
    virtual_pipeline: int | None = option(None, "model chunks a pipeline stage (interleaved schedule)", least=2)
    sequence: bool = option(False, "also split norms and dropout along the sequence; needs tensor > 1")
    context: int = option(1, "processes that share each sequence; above 1 needs Transformer Engine", least=1)


@dataclass(kw_only=True)
class ProcessesConfig:
    """Processes."""

    devices: int = option(1, "processes on each node, one per GPU (or per share of the CPU)", least=1)
    num_nodes: int = option(1, "machines; more than one needs torchrun or srun", least=1)
    accelerator: str = option("auto", "where to run", choices=("auto", "cpu", "gpu"))
    timeout_minutes: float = option(30.0, "minutes a process waits for the others before the run fails", least=0.01)
    verify: bool = option(True, "compare what is read with the sha256 list in its folder; false = trust the disk")


@dataclass(kw_only=True)
class ComputeConfig(ProcessesConfig):
    """Processes and number format."""

    precision: str | None = option(
        None, "number format of the computation; null = bf16 on a GPU, fp32 on a CPU; fp8 needs Transformer Engine",
        choices=("fp32", "bf16", "fp8"),
    )  # fmt: skip

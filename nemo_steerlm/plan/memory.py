"""Memory of one GPU of each pipeline stage, of a node's host, and of a checkpoint on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_steerlm.plan.activations import Activations, stage_activations
from nemo_steerlm.plan.job import Job, Stage
from nemo_steerlm.plan.parameters import Parameters, stage_parameters

#: Share of a GPU that stays free for what nothing here counts: the CUDA context, NCCL's buffers, workspaces of
#: kernels, fragmentation. The same share as generation keeps free (`megatron.decoding`).
ALLOWANCE = 0.05
#: Host memory of one process without data and checkpoints: Python, torch, CUDA's libraries.
PROCESS_BYTES = 4 * 2**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a stage.

    Attributes:
        stage: which one.
        parameters: how many there are.
        weights: the parameters.
        gradients: the buffer in which gradients are summed in fp32.
        optimizer: master weights in fp32 and both moments of AdamW, of this data-parallel rank's share.
        average: the moving average of the weights.
        activations: at the worst moment.
    """

    stage: Stage
    parameters: Parameters
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: Activations

    @property
    def resting(self) -> int:
        """Between two steps."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def peak(self) -> int:
        """At the worst moment of a step."""
        return self.resting + self.activations.peak

    @property
    def saving(self) -> int:
        """While a checkpoint is written: each rank writes its own share, one tensor after the other, from the host."""
        return self.resting

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stage": self.stage.index, "layers": self.stage.layers, "parameters": self.parameters.all,
            "trained": self.parameters.trained, "weights": self.weights, "gradients": self.gradients,
            "optimizer": self.optimizer, "average": self.average, "activations": self.activations.peak,
            "logits": self.activations.logits, "when": self.activations.when, "peak": self.peak,
            "saving": self.saving,
        }  # fmt: skip


def stage_memory(stage: Stage) -> StageMemory:
    """Bytes of one GPU of a stage.

    In bf16 a parameter takes 2 bytes, its gradient's buffer 4, its optimizer state 12: the master weight and two
    moments, shared by the data-parallel ranks where the optimizer is distributed (ZeRO stage 1, arXiv 1910.02054). In
    fp32 the parameter is its own master weight.
    """
    job, counts = stage.job, stage_parameters(stage)
    wide = counts.head if job.width == 2 else counts.trained  # fp32: their own master weights
    narrow = counts.trained - wide
    ranks = job.ranks if job.distributed else 1
    return StageMemory(
        stage=stage,
        parameters=counts,
        weights=job.width * (counts.all - counts.head) + 4 * counts.head,
        gradients=4 * counts.trained,
        optimizer=(12 * narrow + 8 * wide) // ranks,
        average=4 * counts.trained if job.averaged else 0,
        activations=stage_activations(stage),
    )


@dataclass(frozen=True)
class Storage:
    """Bytes of one node's host memory, of a training checkpoint, and of the model folder."""

    host: int
    checkpoint: int
    model: int


def storage(job: Job, stages: list[StageMemory]) -> Storage:
    """Host memory and disk.

    A checkpoint holds the trained weights and the optimizer's state, each once; the model folder all weights. In the
    background a rank writes from a copy of its share in host memory.
    """
    tensor = job.parallel.tensor
    shards = [job.width * (s.parameters.trained) + s.average + s.optimizer * (job.ranks if job.distributed else 1)
              for s in stages]  # fmt: skip
    checkpoint = tensor * sum(shards)
    copies = checkpoint * job.devices // job.world if job.background else 0
    return Storage(job.devices * PROCESS_BYTES + copies, checkpoint, tensor * sum(s.weights for s in stages))

"""Everything that `steerlm plan` tells, from a job and a GPU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from nemo_steerlm.config.gpus import Gpu
from nemo_steerlm.plan.inference import Inference, inference
from nemo_steerlm.plan.job import Job
from nemo_steerlm.plan.memory import ALLOWANCE, StageMemory, Storage, stage_memory, storage
from nemo_steerlm.plan.parameters import model_parameters
from nemo_steerlm.plan.speed import Flops, StepTime, flops_per_token, step_time, tokens_per_second


@dataclass(frozen=True)
class Estimate:
    """A training, planned.

    Attributes:
        job, gpu, mfu: what it was made of.
        steps: optimizer steps, None where the data set is unknown.
        price: of one GPU for an hour, None if not given.
    """

    job: Job
    gpu: Gpu
    mfu: float
    steps: int | None
    price: float | None
    stages: list[StageMemory]
    storage: Storage
    flops: Flops
    time: StepTime
    inference: Inference

    @property
    def worst(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def allowance(self) -> int:
        """Bytes of a GPU for what is not counted."""
        return int(ALLOWANCE * self.gpu.memory)

    @property
    def margin(self) -> int:
        """Bytes that stay free beside the allowance; negative where it does not fit."""
        return int(self.gpu.memory) - self.allowance - self.worst.peak

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return tokens_per_second(self.job, self.time)

    @property
    def mfu_reached(self) -> float:
        """Model FLOPs of the tokens over what all GPUs can do: what is left of `mfu` after all other times."""
        return self.tokens_per_second * self.flops.model / (self.gpu.flops * self.job.world)

    @property
    def hours(self) -> float | None:
        """Of all steps; None where their number is unknown."""
        return None if self.steps is None else self.steps * self.time.total / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Of all GPUs."""
        return None if self.hours is None else self.hours * self.job.world

    @property
    def cost(self) -> float | None:
        """Of all GPU-hours."""
        return None if self.gpu_hours is None or self.price is None else self.gpu_hours * self.price

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds and numbers, not rounded."""
        job = self.job
        return {
            "fits": self.margin >= 0,
            "margin": self.margin,
            "allowance": self.allowance,
            "gpu": dataclasses.asdict(self.gpu),
            "parameters": dict(zip(("all", "trained"), model_parameters(job))),
            "layout": {**dataclasses.asdict(job.parallel), "data": job.ranks, "gpus": job.world},
            "micro_batches": job.micro_batches,
            "stages": [stage.as_dict() for stage in self.stages],
            "storage": dataclasses.asdict(self.storage),
            "flops_per_token": dataclasses.asdict(self.flops),
            "step_seconds": {**dataclasses.asdict(self.time), "total": self.time.total},
            "bubble_share": self.time.bubble_share,
            "tokens_per_second": self.tokens_per_second,
            "mfu": {"products": self.mfu, "reached": self.mfu_reached},
            "padding": job.padding,
            "steps": self.steps,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "price": self.cost,
            "inference": {**dataclasses.asdict(self.inference), "peak": self.inference.peak},
        }


def estimate(job: Job, gpu: Gpu, mfu: float, *, steps: int | None = None, price: float | None = None) -> Estimate:
    """Plan a training; generation of 64 rows of 512 read and 512 drawn tokens is planned at the same layout."""
    stages = [stage_memory(stage) for stage in job.stages()]
    return Estimate(
        job=job, gpu=gpu, mfu=mfu, steps=steps, price=price, stages=stages, storage=storage(job, stages),
        flops=flops_per_token(job), time=step_time(job, gpu, mfu),
        inference=inference(job, gpu, mfu, prompt=512, longest=1024, rows=64),
    )  # fmt: skip


def steps_of(max_steps: int | None, max_epochs: float | None, samples: int | None, batch: int) -> int | None:
    """Optimizer steps of a training, as `train.fit` counts them; None where they are unknown."""
    if max_steps is not None or samples is None or not max_epochs:
        return max_steps
    return max(1, math.ceil(max_epochs * samples / batch))

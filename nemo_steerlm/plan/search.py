"""All layouts of a training on its GPUs that fit, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_steerlm.config.gpus import Gpu
from nemo_steerlm.config.layout import check_layout
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.plan.job import Job, Stage, with_layout
from nemo_steerlm.plan.memory import ALLOWANCE, stage_memory
from nemo_steerlm.plan.speed import step_time, tokens_per_second

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_CHUNKS = (None, 2, 3, 4, 5, 6, 8, 10)


@dataclass(frozen=True)
class Found:
    """A layout that fits.

    Attributes:
        job: the training at that layout.
        tokens_per_second: over all GPUs.
        peak: bytes of the fullest GPU.
        margin: bytes that stay free beside the allowance.
        bubble_share: of a step.
    """

    job: Job
    tokens_per_second: float
    peak: int
    margin: int
    bubble_share: float

    def words(self, current: Job) -> str:
        """What a user adds to the command whose job is `current`."""
        ours, theirs = _words(self.job), _words(current)
        return " ".join(word for word in ours if word not in theirs) or "(as it is)"


def _words(job: Job) -> list[str]:
    parallel = job.parallel
    return [
        f"parallel.tensor={parallel.tensor}",
        f"parallel.sequence={str(parallel.sequence).lower()}",
        f"parallel.pipeline={parallel.pipeline}",
        f"parallel.virtual_pipeline={parallel.virtual_pipeline or 'null'}",
        *([] if job.packed else [f"trainer.micro_batch_size={job.rows // job.texts}"]),
        f"trainer.recompute={job.recompute}",
        f"optimizer.distributed={str(job.distributed).lower()}",
    ]


def search(job: Job, gpu: Gpu, mfu: float) -> list[Found]:
    """Every layout of the job's GPUs that divides model and batch, and fits; the most tokens a second first."""
    found = []
    for candidate in _candidates(job):
        peak = max(stage_memory(stage).peak for stage in _ends(candidate))
        margin = int(gpu.memory * (1 - ALLOWANCE)) - peak
        if margin >= 0:
            time = step_time(candidate, gpu, mfu)
            speed = tokens_per_second(candidate, time)
            found.append(Found(candidate, speed, peak, margin, time.bubble_share))
    return sorted(found, key=lambda one: (-one.tokens_per_second, -one.margin))


def _ends(job: Job) -> list[Stage]:
    """The stages that can be the fullest: the first two and the last two."""
    stages = job.stages()
    return stages if len(stages) < 5 else stages[:2] + stages[-2:]


def _candidates(job: Job) -> Iterator[Job]:
    it = job.architecture
    for tensor in (size for size in range(1, job.devices + 1) if job.world % size == 0):
        for pipeline in (size for size in range(1, it.num_layers + 1) if job.world // tensor % size == 0):
            for chunks in _CHUNKS if pipeline > 1 else (None,):
                layout = with_layout(
                    job, tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, sequence=tensor > 1
                )
                try:
                    check_layout(it, layout.parallel)
                except ConfigError:
                    continue
                for rows in (job.rows,) if job.packed else _MICRO_BATCHES:
                    # a shared optimizer is never slower, and never takes more
                    sized = with_layout(layout, rows=rows * job.texts if not job.packed else rows, distributed=True)
                    if _divides(sized):
                        for recompute in ("none", "selective", "full"):
                            yield with_layout(sized, recompute=recompute)


def _divides(job: Job) -> bool:
    """Whether the data-parallel ranks share the batch as `config.training.Training` wants it."""
    if job.trained in ("head", "tokens") and job.parallel.pipeline > 1:  # `TrainConfig` refuses it
        return False
    if job.packed:
        return True
    rows, rest = divmod(job.batch * job.texts, job.rows * job.ranks)
    return not rest and not (job.parallel.virtual_pipeline and rows % job.parallel.pipeline)

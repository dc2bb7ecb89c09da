"""`make test-dry`: one step of every experiment of conf/ at full size, on the first, a middle and the last stage."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.config import TrainConfig, TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.config.compose import conf_folder, draft
from nemo_steerlm.config.experiments import Experiment, experiments
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.fake_gpu.dry_run import measure
from nemo_steerlm.fake_gpu.memory import GIB
from nemo_steerlm.fake_gpu.room import Room
from nemo_steerlm.plan.job import training_job, with_micro_batches
from nemo_steerlm.plan.memory import stage_memory

pytestmark = pytest.mark.dry
VERBS: dict[str, type[TrainConfig]] = {"train-sft": TrainSftConfig, "train-regressor": TrainRegressorConfig}
ONCE_A_STEP = {"finalize_model_grads", "get_grad_norm_fp32", "sum_over_ranks"}  # see benchmarks/RESULTS.md
AT_EVERY_EXCHANGE = {"_communicate"}  # between stages: megatron-core's own, `batch_p2p_sync`


def config_of(experiment: Experiment) -> Any:
    """What its command asks for, with the shape of the model in its name."""
    _, verb, *words = shlex.split(experiment.command)
    config: Any = OmegaConf.to_object(draft(verb, VERBS[verb], words))
    shape = OmegaConf.load(conf_folder() / "model" / f"{experiment.model}.yaml")
    given = OmegaConf.merge(OmegaConf.structured(config), {"model": shape})
    return OmegaConf.to_object(given)


def trainings() -> list[Any]:
    """Every experiment that trains, at its first, middle and last stage."""
    found = []
    for experiment in experiments([conf_folder()]):
        if experiment.verb in VERBS:
            stages = config_of(experiment).parallel.pipeline
            places = sorted({0, stages // 2, stages - 1})
            names = {place: f"{experiment.name}-{place}" for place in places}
            found += [
                pytest.param(experiment, place, id=name, marks=pytest.mark.xdist_group(name))  # on every worker
                for place, name in names.items()
            ]
    return found


@pytest.mark.parametrize(("experiment", "stage"), trainings())
def test_a_step_at_full_size(room: Room, experiment: Experiment, stage: int) -> None:
    config = config_of(experiment)
    found = measure(room, config, stage=stage)
    print(experiment.name, json.dumps(asdict(found)))  # noqa: T201
    assert sum(found.parts.values()) == found.peak
    job = with_micro_batches(training_job(config, config.model.architecture), found.micro_batches)
    assert stage_memory(job.stages()[stage]).peak == pytest.approx(found.peak, rel=0.03)
    assert max(found.peak, found.saving) < GPUS[config.trainer.gpu].memory, f"{found.peak / GIB:.1f} GiB"
    waits = {place.split()[-1]: count for place, count in found.waits.items()}
    assert all(count == 1 for name, count in waits.items() if name not in AT_EVERY_EXCHANGE), found.waits
    assert waits.keys() <= (ONCE_A_STEP | AT_EVERY_EXCHANGE if config.parallel.pipeline > 1 else ONCE_A_STEP)

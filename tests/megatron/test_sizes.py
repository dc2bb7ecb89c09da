"""The shapes in conf/model have the parameter counts of the models they are named after, and build at every layout.

Models are built on the meta device: their parameters have shapes and no data.
"""

from __future__ import annotations

import math
import shlex
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import Architecture, ParallelConfig, compose
from nemo_steerlm.config.experiments import experiments
from nemo_steerlm.config.primary import conf_folder
from tests.distributed import ROOT, run_distributed

# as the published checkpoints count themselves
COUNTS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_70b": 70_553_706_496,
    "llama_260k": 260_032,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "smollm2_135m": 134_515_008,
}
# as their reports say: embedding and other parameters (arXiv 2402.16819, table 1; 2406.11704, table 1)
NEMOTRON = {"nemotron_4_15b": (3.2e9, 12.5e9), "nemotron_4_340b": (9.4e9, 331.6e9)}
PUBLISHED = {
    **COUNTS,
    **{name: sum(parts) for name, parts in NEMOTRON.items()},
    "nemotron_43b": 43e9,  # arXiv 2310.05344, section 4.2
}
MODELS = sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml") if file.stem != "llama_tiny")
EXPERIMENTS = experiments([conf_folder()])


def _architecture(name: str) -> Architecture:
    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), values))
    assert isinstance(architecture, Architecture)
    return architecture


def _parameters(name: str) -> int:
    from nemo_steerlm.formats.hf_config import tensor_shapes

    return sum(math.prod(shape) for shape in tensor_shapes(_architecture(name)).values())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    assert _parameters(name) == COUNTS[name]


@pytest.mark.parametrize(("name", "embedding", "others"), [(name, *parts) for name, parts in NEMOTRON.items()])
def test_nemotron_has_the_parameters_of_its_report(name: str, embedding: float, others: float) -> None:
    values = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml").architecture
    tables = 2 * values.vocab_size * values.hidden_size
    assert tables == pytest.approx(embedding, rel=0.02)
    assert _parameters(name) - tables == pytest.approx(others, rel=0.01)


def _job(command: str) -> dict[str, Any]:
    """What an experiment builds: its layout, and the outputs of a regression head (None: a language model)."""
    _, verb, *words = shlex.split(command)
    settings = compose.load(verb, getattr(config, VERBS[verb][1]), words)
    of_regression = verb == "train-regressor" and settings.head != "generative"
    layout = settings.parallel
    return {
        "layout": dict(tensor=layout.tensor, pipeline=layout.pipeline, sequence=layout.sequence),
        "outputs": len(settings.attributes.require()) if of_regression else None,
    }


def build_all(jobs: list[dict[str, Any]]) -> list[list[list[int]]]:
    """For each job and each of its first, a middle and its last stage: parameters of a rank, and of all its ranks."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_steerlm.megatron import gpt

    # where megatron-core makes and moves tensors
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]

    def stage(name: str, layout: ParallelConfig, outputs: int | None, place: int) -> list[int]:
        world = layout.tensor * layout.pipeline
        dist.init_process_group("fake", store=FakeStore(), rank=place * layout.tensor, world_size=world)
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, create_gloo_process_groups=False)
        with torch.device("meta"):
            (chunk,) = gpt.build(_architecture(name), layout, torch.bfloat16, outputs, initialise=False)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        weights = dict(chunk.named_parameters())
        assert {weight.device.type for weight in weights.values()} == {"meta"}
        repeated = {key for key in weights if "norm" in key or key == "score.weight"}  # on every tensor-parallel rank
        sizes = {key: weight.numel() for key, weight in weights.items()}
        whole = sum(size * (1 if key in repeated else layout.tensor) for key, size in sizes.items())
        return [sum(sizes.values()), whole]

    found = []
    for job in jobs:
        layout = ParallelConfig(**job["layout"])
        places = (0, layout.pipeline // 2, layout.pipeline - 1)
        found.append([stage(job["model"], layout, job["outputs"], place) for place in places])
    return found


def test_models_and_experiments_build_at_their_layout() -> None:
    assert set(MODELS) == set(PUBLISHED)
    jobs: list[dict[str, Any]] = [{"model": name, "layout": {}, "outputs": None} for name in MODELS]
    jobs += [{"model": experiment.model, **_job(experiment.command)} for experiment in EXPERIMENTS]
    for job, stages in zip(jobs, run_distributed(build_all, 1, jobs=jobs), strict=True):
        (_, first), (_, middle), (_, last) = stages
        pipeline = job["layout"].get("pipeline", 1)
        built = first if pipeline == 1 else first + (pipeline - 2) * middle + last
        shape, outputs = _architecture(job["model"]), job["outputs"]
        table, head = shape.vocab_size * shape.hidden_size, (outputs or 0) * shape.hidden_size
        heads = 0 if outputs is None else head - table  # a regression head in the place of the output table
        assert built == _parameters(job["model"]) + heads, job
        assert built - heads == pytest.approx(PUBLISHED[job["model"]], rel=0.01), job

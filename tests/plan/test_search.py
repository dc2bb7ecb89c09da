"""The layouts that are listed: what they are, that they fit, and their order."""

from __future__ import annotations

import dataclasses

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.plan.estimate import estimate
from nemo_steerlm.plan.job import Job
from nemo_steerlm.plan.search import search
from tests.plan.helpers import shape

JOB = Job(
    architecture=shape("llama2_13b"), devices=8, packed=True, parallel=ParallelConfig(tensor=4, sequence=True)
)  # fmt: skip
H100 = GPUS["h100_80g"]


def test_listed_layouts_fit_and_the_fastest_is_first() -> None:
    found = search(JOB, H100, 0.4)
    speeds = [one.tokens_per_second for one in found]
    assert speeds == sorted(speeds, reverse=True) and len(found) > 20
    for one in (found[0], found[-1]):
        again = estimate(one.job, H100, 0.4)
        assert (again.tokens_per_second, again.margin) == (one.tokens_per_second, one.margin) and one.margin >= 0
    layouts = {(j.parallel.tensor, j.parallel.pipeline, j.parallel.virtual_pipeline, j.recompute) for j in
               (one.job for one in found)}  # fmt: skip
    assert len(layouts) == len(found) and (4, 1, None, "none") in layouts
    assert (1, 1, None, "none") not in layouts, "18 bytes a parameter are more than one GPU has"


def test_the_words_are_what_differs_from_the_command() -> None:
    found = {(one.job.parallel.tensor, one.job.parallel.pipeline, one.job.recompute): one for one in
             search(JOB, H100, 0.4)}  # fmt: skip
    assert found[4, 1, "none"].words(JOB) == "(as it is)"
    assert found[2, 1, "none"].words(JOB) == "parallel.tensor=2"
    assert found[8, 1, "full"].words(JOB) == "parallel.tensor=8 trainer.recompute=full"


def test_without_packing_the_batch_is_divided() -> None:
    job = dataclasses.replace(JOB, packed=False, batch=12)
    rows = {(one.job.rows, one.job.ranks) for one in search(job, GPUS["h200_141g"], 0.4)}
    assert rows and all(12 % (size * ranks) == 0 for size, ranks in rows)


def test_a_head_alone_is_trained_on_one_stage() -> None:
    job = dataclasses.replace(JOB, trained="head", outputs=9)
    assert {one.job.parallel.pipeline for one in search(job, H100, 0.4)} == {1}

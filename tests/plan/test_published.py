"""Layouts that others have published for the same models fit, by this arithmetic too.

NVIDIA/NeMo-Framework-Launcher, examples/README.md: fine-tuning of Llama 2 on H100, rows of 4,096 tokens.
NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md (26.06): Llama 3. NVIDIA-NeMo/Automodel,
docs/performance-summary.mdx: LoRA of Llama 3 8B on one H100.
"""

from __future__ import annotations

from typing import Any

import pytest

from nemo_steerlm.config import LoRAConfig, ParallelConfig
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.plan.estimate import Estimate, estimate
from nemo_steerlm.plan.job import Job, with_layout
from tests.plan.helpers import shape


def plan(
    name: str, nodes: int, devices: int, rank: int = 0, rows: int = 1, gpu: str = "h100_80g", **layout: int
) -> Estimate:
    parallel = ParallelConfig(sequence=layout.get("tensor", 1) > 1, **layout)  # type: ignore[arg-type]
    job = Job(
        architecture=shape(name), parallel=parallel, nodes=nodes, devices=devices, rows=rows, packed=rows == 1,
        batch=128, trained="lora" if rank else "all", lora=LoRAConfig(rank=rank),
    )  # fmt: skip
    return estimate(job, GPUS[gpu], 0.4)


@pytest.mark.parametrize(
    ("name", "devices", "rank", "layout"),
    [
        ("llama2_7b", 8, 0, {}),
        ("llama2_7b", 8, 32, {}),
        ("llama2_13b", 8, 0, {"pipeline": 4}),
        ("llama2_13b", 8, 32, {}),
        ("llama2_70b", 8, 32, {"tensor": 2, "pipeline": 4}),
        ("llama3_70b", 8, 32, {"tensor": 2, "pipeline": 4, "virtual_pipeline": 20}),
    ],
)
def test_published_layouts_fit(name: str, devices: int, rank: int, layout: dict[str, Any]) -> None:
    assert plan(name, 1, devices, rank, **layout).margin > 0


def test_full_fine_tuning_of_70b_takes_more_than_published() -> None:
    """16 GPUs hold it where gradients are bf16; here they are summed in fp32, and the parameters alone fill a GPU.

    32 GPUs in 4 stages of 5 chunks hold it with recomputed layers.
    """
    found = plan("llama2_70b", 2, 8, tensor=4, pipeline=4)
    assert found.margin < 0 and found.worst.resting > 0.97 * found.gpu.memory
    assert plan("llama3_70b", 4, 8, tensor=4, pipeline=4, virtual_pipeline=5).margin < 0
    job = with_layout(plan("llama3_70b", 4, 8, tensor=4, pipeline=4, virtual_pipeline=5).job, recompute="full")
    assert estimate(job, GPUS["h100_80g"], 0.4).margin > 0


def test_the_speed_of_lora_on_one_gpu() -> None:
    """12,473 tokens/s and 402 TFLOP/s in bf16, two rows of 4,096 a micro-batch: where the default `mfu` is from."""
    found = plan("llama3_8b", 1, 1, 16, rows=2)
    assert found.margin > 0
    assert found.tokens_per_second == pytest.approx(12473, rel=0.1)


def test_the_papers_cluster_holds_its_43b_model() -> None:
    """16 nodes of 8 A100-80G (arXiv 2310.05344, section 4.3), batches of 128."""
    found = plan("nemotron_43b", 16, 8, gpu="a100_80g", tensor=8)
    assert found.margin > 0 and found.worst.peak < 45 * 2**30

"""Numbers that one GPU holds, of each part of the model, as `megatron.gpt.build` makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.plan.job import Job, Stage


@dataclass(frozen=True)
class Parameters:
    """Of one GPU: all parameters, those that are trained, and those of them in a head that is always fp32."""

    all: int
    trained: int
    head: int = 0


def linears(job: Job) -> dict[str, tuple[int, int, bool]]:
    """(output, input, column-parallel) of a layer's linears on one tensor-parallel rank, by megatron-core's names."""
    it, tensor = job.architecture, job.parallel.tensor
    heads = (it.num_attention_heads + 2 * it.key_value_heads) * it.head_size // tensor
    inner = it.ffn_hidden_size // tensor
    return {
        "linear_qkv": (heads, it.hidden_size, True),
        "linear_proj": (it.hidden_size, it.num_attention_heads * it.head_size // tensor, False),
        "linear_fc1": (inner * (2 if job.family.gated else 1), it.hidden_size, True),
        "linear_fc2": (it.hidden_size, inner, False),
    }


def layer_parameters(job: Job) -> int:
    """Parameters of one layer: linears, bias of queries, keys and values, norms."""
    it, family, parts = job.architecture, job.family, linears(job)
    norm = it.hidden_size * (2 if family.layernorm1p else 1)
    return (
        sum(output * width for output, width, _ in parts.values())
        + (parts["linear_qkv"][0] if family.qkv_bias else 0)
        + 2 * norm
        + (2 * it.head_size if family.qk_norm else 0)
    )


def adapter_parameters(job: Job) -> int:
    """Parameters of one layer's adapters (`megatron.lora`): `rank * (output + input)` of each target."""
    parts = linears(job)
    return sum(job.lora.rank * (parts[name][0] + parts[name][1]) for name in job.lora.targets) if job.lora.rank else 0


def stage_parameters(stage: Stage) -> Parameters:
    """Parameters of one GPU of a stage."""
    job = stage.job
    it, table = job.architecture, job.vocabulary * job.architecture.hidden_size
    layers = stage.layers * layer_parameters(job)
    adapters = stage.layers * adapter_parameters(job) if job.trained == "lora" else 0
    tied = it.tie_word_embeddings and job.outputs is None
    ends = table * stage.first
    head = 0
    if stage.last:
        ends += it.hidden_size * (2 if job.family.layernorm1p else 1)
        if job.outputs is not None:
            head = job.outputs * it.hidden_size
        elif not (tied and stage.first):
            ends += table
    tokens = job.attribute_tokens * it.hidden_size * (stage.first or (stage.last and tied))
    total = layers + ends + adapters + tokens + head
    trained = {"all": total, "lora": adapters + head + tokens, "head": head, "tokens": tokens}[job.trained]
    return Parameters(total, trained, head)


def model_parameters(job: Job) -> tuple[int, int]:
    """Parameters of the whole model and those that are trained, each counted once."""
    whole = replace(job, parallel=ParallelConfig(), nodes=1, devices=1)
    found = stage_parameters(whole.stages()[0])
    return found.all, found.trained

"""Time of a training step: products, recomputation, communication, pipeline bubble, optimizer.

A model of the first order: nothing overlaps, every GPU of a stage is equally fast. What each term assumes stands at
its function; the sources are those of docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_steerlm.config.gpus import Gpu
from nemo_steerlm.plan.job import Job, with_layout
from nemo_steerlm.plan.parameters import linears, stage_parameters

#: Share of a link's data-sheet speed that large collectives reach. An assumption.
LINK_SHARE = 0.7
#: Bytes/s from one GPU to other nodes: 200 Gb/s, as the DGX A100 has for each of its GPUs. An assumption elsewhere.
NETWORK = 25e9
#: Bytes/s from one GPU to another without NVLink: PCI Express 4.0 with 16 lanes.
PCIE = 32e9


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token, forward and backward, in the whole model.

    Attributes:
        forward: of the forward pass alone.
        model: of a training step, what the mathematics needs (the numerator of MFU, arXiv 2204.02311, appendix B).
        recomputed: of what is computed again in the backward pass.
    """

    forward: float
    model: float
    recomputed: float


def flops_per_token(job: Job) -> Flops:
    """Two operations a parameter of a linear; attention by the causal half of a sample's keys.

    A token of a sample of `s` tokens attends to `s / 2` of them on average, each of which takes
    `4 * heads * head size` operations. The backward pass takes twice the forward pass's; half of that where weights
    are frozen and only the gradient of the input is needed. The vocabulary is projected where there is loss.
    """
    layers, adapters, attention, head = _forward(job)
    forward = layers + adapters + attention + head
    if job.trained == "head":
        return Flops(forward, forward, 0.0)
    factor = 3 if job.trained == "all" else 2
    again = {"none": 0.0, "selective": attention, "full": layers + adapters + attention}[job.recompute]
    return Flops(forward, factor * (layers + head) + 3 * (adapters + attention), again)


def _forward(job: Job) -> tuple[float, float, float, float]:
    """Of the layers' linears, their adapters, attention, and the head."""
    it, whole = job.architecture, linears(with_layout(job, tensor=1))
    layers = 2.0 * it.num_layers * sum(output * width for output, width, _ in whole.values())
    adapters = 0.0
    if job.trained == "lora":
        adapters = 2.0 * it.num_layers * sum(job.lora.rank * sum(whole[name][:2]) for name in job.lora.targets)
    attention = it.num_layers * 4.0 * it.num_attention_heads * it.head_size * job.sample / 2
    outputs = job.outputs if job.outputs is not None else job.vocabulary * job.parallel.tensor * job.loss_share
    return layers, adapters, attention, 2.0 * outputs * it.hidden_size


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        products: of what the mathematics needs, at the assumed share of the peak.
        recomputation: of what is computed again.
        accumulation: adding the weights' gradients to their fp32 buffer, once a micro-batch.
        tensor: collectives of tensor parallelism.
        pipeline: sending between stages.
        bubble: waiting for the first and the last micro-batches to pass the pipeline.
        data: summing gradients and sharing weights over data-parallel ranks.
        optimizer: its own reading and writing.
    """

    products: float
    recomputation: float
    accumulation: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def bubble_share(self) -> float:
        """The bubble's part of the step."""
        return self.bubble / self.total


def step_time(job: Job, gpu: Gpu, mfu: float) -> StepTime:
    """The time of a step, whose pace the slowest pipeline stage sets."""
    parallel, count = job.parallel, job.micro_batches
    flops, stages = flops_per_token(job), job.stages()
    slowest = max(range(len(stages)), key=lambda i: _weight(job, i))
    share = _weight(job, slowest) / sum(_weight(job, i) for i in range(len(stages))) / parallel.tensor
    speed = gpu.flops * mfu * (2 / job.width)  # fp32: TF32 products, half as fast as bf16
    products = count * job.computed * flops.model * share / speed
    recomputation = count * job.computed * flops.recomputed * share / speed
    own = stage_parameters(stages[slowest])
    # a gradient is written in bf16, read, and added to what is read and written in fp32
    accumulation = count * own.trained * (2 * job.width + 8) / gpu.bandwidth
    tensor = count * stages[slowest].layers * _tensor_bytes(job) / _link(gpu, parallel.tensor <= job.devices)
    chunks = parallel.virtual_pipeline or 1
    sent = job.width * job.computed * job.architecture.hidden_size / (parallel.tensor if parallel.sequence else 1)
    near = parallel.tensor * parallel.pipeline <= job.devices
    pipeline = 2 * count * chunks * sent / _link(gpu, near) if parallel.pipeline > 1 else 0.0
    busy = products + recomputation + accumulation + tensor + pipeline
    # (p - 1) / m of the time that is not waiting, divided by the chunks of a stage (arXiv 2104.04473, section 2.2)
    bubble = busy * (parallel.pipeline - 1) / (count * chunks)
    data = 0.0
    if job.ranks > 1:  # sums in fp32, then the weights
        moved = (4 + job.width) if job.distributed else 8
        data = own.trained * moved * (job.ranks - 1) / job.ranks / _link(gpu, job.world <= job.devices)
    # reads gradient, master weight and moments, writes the latter and the weight
    updated = own.trained / (job.ranks if job.distributed else 1)
    optimizer = updated * (4 + 2 * 12 + job.width) / gpu.bandwidth
    return StepTime(products, recomputation, accumulation, tensor, pipeline, bubble, data, optimizer)


def _weight(job: Job, index: int) -> float:
    """The work of a stage, its head included, in layers."""
    stage, it = job.stages()[index], job.architecture
    layers, adapters, attention, head = _forward(job)
    return stage.layers + (head / ((layers + adapters + attention) / it.num_layers) if stage.last else 0.0)


def _tensor_bytes(job: Job) -> float:
    """Bytes that a layer's collectives move through a GPU's link, forward and backward.

    Two all-reduces forward and two backward (arXiv 1909.08053, section 3), each of `2 (t - 1) / t` of a tensor of the
    residual stream; sequence parallelism gathers and scatters the same, and gathers the inputs of two linears again
    for their gradients (arXiv 2205.05198, section 4.2.2). Recomputed layers repeat the forward ones.
    """
    tensor = job.parallel.tensor
    hidden = job.width * job.computed * job.architecture.hidden_size * (tensor - 1) / tensor
    reduces = {"all": 4, "lora": 4, "tokens": 4, "head": 2}[job.trained] + (2 if job.recompute == "full" else 0)
    gathers = 2 if job.parallel.sequence and job.trained == "all" else 0
    return (2 * reduces + gathers) * hidden


def _link(gpu: Gpu, within_node: bool) -> float:
    """Bytes/s that a GPU sends in a collective."""
    return LINK_SHARE * ((gpu.nvlink / 2 or PCIE) if within_node else NETWORK)


def tokens_per_second(job: Job, time: StepTime) -> float:
    """Tokens of samples, padding not counted, over all GPUs."""
    return job.batch * job.sample / time.total

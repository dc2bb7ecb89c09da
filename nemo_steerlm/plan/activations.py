"""Activation memory of one GPU, after "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198, section 4): what each operation of `megatron.layers` keeps for the backward pass, and what it needs beside
that while it runs.

Names of sizes, in bytes of one micro-batch on one GPU: `hidden`, a tensor of the residual stream; `shard`, its part
under sequence parallelism; `query`, `keys` (of keys, or of values), `inner` (inside the feed-forward block).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_steerlm.plan.job import Job, Stage
from nemo_steerlm.plan.parameters import linears

#: Bytes of a number in fp32, in which logits, losses and the norms' statistics are computed.
_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Of one GPU: the most bytes at once, when that is, and how much of it is kept, and logits'."""

    peak: int
    when: str
    kept: int
    logits: int


class Sizes:
    """Bytes of the tensors of one micro-batch."""

    def __init__(self, job: Job) -> None:
        it, tensor, width = job.architecture, job.parallel.tensor, job.width
        self.job, self.tokens = job, job.tokens
        self.sequence = job.parallel.sequence and tensor > 1
        self.own_tokens = job.tokens // tensor if self.sequence else job.tokens
        self.hidden = width * job.tokens * it.hidden_size
        self.shard = self.hidden // tensor if self.sequence else self.hidden
        self.query = width * job.tokens * it.num_attention_heads * it.head_size // tensor
        self.keys = width * job.tokens * it.key_value_heads * it.head_size // tensor
        self.inner = width * job.tokens * it.ffn_hidden_size // tensor
        self.gates = self.inner * (2 if job.family.gated else 1)
        self.statistics = _FP32 * job.tokens * it.num_attention_heads // tensor  # log of attention's sums
        self.weights = {name: width * output * inputs for name, (output, inputs, _) in linears(job).items()}
        self.table = width * job.vocabulary * it.hidden_size
        self.logits = round(job.loss_share * job.tokens) * job.vocabulary  # numbers, not bytes
        self.all_logits = job.tokens * job.vocabulary
        # The gathered input of a trained linear is kept in one buffer for all of them.
        self.buffer = self.hidden if self.sequence and job.trained == "all" else 0
        # Of every micro-batch until the step ends: cosines and sines of its positions, and its tokens and labels.
        angles = width * job.length * int(it.head_size * it.rotary_percent)
        self.batches = job.micro_batches * (angles + 3 * 8 * job.tokens)

    def needs_input(self, linear: str) -> bool:
        """Whether a linear's input is kept: for its own gradient, or for its adapter's."""
        return self.job.trained == "all" or (self.job.trained == "lora" and linear in self.job.lora.targets)


def layer_kept(sizes: Sizes) -> int:
    """Bytes that one layer keeps of a micro-batch, from its input up to its output, the output not included."""
    job, family = sizes.job, sizes.job.family
    if job.trained == "head":
        return 0
    grouped = sizes.query != sizes.keys
    norms = 2 * sizes.shard  # inputs of both
    norms += sizes.shard * (sizes.needs_input("linear_qkv") + sizes.needs_input("linear_fc1"))  # outputs of both
    statistics = 2 * _FP32 * (2 if family.layernorm1p else 1) * sizes.own_tokens
    projected = sizes.query + 2 * sizes.keys  # the values are a view of it
    if family.qk_norm:  # inputs of these norms; keys are a view
        projected += sizes.query if grouped else 0
    output = sizes.query * sizes.needs_input("linear_proj")
    if job.recompute == "selective":  # core attention's own inputs: queries that were copied out of their groups
        attention = projected + output + (sizes.query + sizes.keys if family.qk_norm else sizes.query * grouped)
    else:  # rotated queries and keys, the result in the kernel's order
        attention = projected + sizes.query + sizes.keys + sizes.query + sizes.statistics
        attention += output if job.width == 2 else 0
    feed_forward = sizes.gates + sizes.inner * sizes.needs_input("linear_fc2")
    if not family.gated:  # the square keeps its input, which the ReLU before it has made
        feed_forward = sizes.inner + sizes.inner * sizes.needs_input("linear_fc2")
    return norms + statistics + attention + feed_forward + _adapters_kept(sizes)


def _adapters_kept(sizes: Sizes) -> int:
    """Inputs of the adapters' second matrices, and masks of dropout, a byte a number."""
    job, width = sizes.job, sizes.job.width
    kept = 2 * sizes.shard // width if job.architecture.hidden_dropout else 0
    if job.trained == "lora":
        kept += len(job.lora.targets) * width * job.tokens * job.lora.rank
        if job.lora.dropout:
            inputs = {"linear_qkv": sizes.shard, "linear_proj": sizes.query, "linear_fc1": sizes.shard,
                      "linear_fc2": sizes.inner}  # fmt: skip
            kept += sum(inputs[name] for name in job.lora.targets) // width
    return kept


def stage_activations(stage: Stage) -> Activations:
    """The peak of a stage: the largest of the moments below, during which its chunks in flight keep their own."""
    sizes = Sizes(stage.job)
    full = stage.job.recompute == "full"
    layer = layer_kept(sizes)
    each = sizes.shard if full and layer else layer
    chunk = round(stage.chunk * each) + (sizes.shard if layer else 0)  # and its output
    if stage.first and stage.job.trained == "lora" and not (full or stage.job.attribute_tokens):
        # the embedding's output needs no gradient
        chunk -= sizes.shard
    kept = stage.in_flight * chunk + sizes.shard * _on_the_way(stage) + sizes.batches
    again = layer if full else 0
    moments = {"in the last layer": kept + again + _layer_moment(sizes, stage)}
    logits = 0
    if stage.last:
        moments["in the head"], logits = _head_moment(sizes)
        moments["in the head"] += kept
    if stage.first and stage.job.trained == "all":
        moments["in the embedding"] = kept - chunk + sizes.table + sizes.hidden
    when = max(moments, key=lambda name: moments[name])
    return Activations(moments[when] + sizes.buffer, when, kept, logits if when == "in the head" else 0)


def _on_the_way(stage: Stage) -> int:
    """Tensors of the residual stream that the schedule holds beside those of the chunks in flight.

    The input and its gradient of the micro-batch before, the next input; two of each where stages interleave
    (megatron-core 0.16 to 0.19, pipeline_parallel/schedules.py, as counted on fake tensors).
    """
    if stage.job.parallel.virtual_pipeline:
        return 4 if stage.last else 2
    return 0 if stage.job.parallel.pipeline == 1 else int(not stage.first) + int(stage.last)


def _layer_moment(sizes: Sizes, stage: Stage) -> int:
    """What the last layer needs beside what is kept, at the worst moment of its feed-forward block."""
    job, gated = sizes.job, sizes.job.family.gated
    output = 0 if not stage.last else -sizes.shard  # the gradient has taken its place
    gathered = sizes.hidden if sizes.sequence else 0  # the output's gradient
    if job.trained == "head":
        return sizes.gates + sizes.inner + 4 * sizes.shard
    weights = sizes.weights if job.trained == "all" else dict.fromkeys(sizes.weights, 0)
    adapted = job.trained == "lora"
    moments = [
        # fc2: the gradient of its input, and the weight's own
        gathered + sizes.inner + weights["linear_fc2"],
        # the activation function: gradients of its output and its input, its output being gone; of two adapters' sum
        2 * sizes.inner if gated or adapted else sizes.inner,
        # fc1: the gradient of its input, whole and cut; the block's inner tensors but one gradient are gone
        sizes.hidden + (sizes.shard if sizes.sequence else 0) + weights["linear_fc1"] - sizes.inner,
    ]
    if adapted and "linear_fc1" in job.lora.targets:
        # forward: its output, and its adapter's before and after scaling; the first chunk holds the embedding's output
        already = sizes.gates + sizes.inner if gated else 2 * sizes.inner
        held = sizes.shard if stage.first and job.recompute != "full" else 0
        held += sizes.shard if not stage.last else 0  # a gradient has come from the next stage
        return max(output + sizes.shard + max(moments), 3 * sizes.gates + held - already - sizes.shard)
    return output + sizes.shard + max(moments)


def _head_moment(sizes: Sizes) -> tuple[int, int]:
    """What the head needs beside what is kept, and how much of it is logits and their gradients."""
    job, width = sizes.job, sizes.job.width
    trained = job.trained == "all"
    if job.outputs is not None:  # its input in fp32, and the gradient of that
        wide = _FP32 * job.tokens * job.architecture.hidden_size
        return wide if job.trained == "head" else 2 * wide, 0
    chosen = width * round(job.loss_share * job.tokens) * job.architecture.hidden_size
    inputs = (sizes.shard if sizes.sequence else chosen) if trained else 0
    exponentials = sizes.logits * (_FP32 + width if width == 2 else _FP32)
    gradient = sizes.logits * width
    table = sizes.table if trained else 0
    if sizes.sequence:  # all positions are projected, then those with loss are chosen
        whole = sizes.all_logits * width
        loss = max(exponentials, whole + (gradient if trained else sizes.hidden + sizes.shard))
        backward = whole + sizes.hidden + sizes.shard + table
    else:
        loss = exponentials
        backward = gradient * (1 if trained else 2) + chosen + table
    return (inputs + loss, loss) if loss >= backward else (inputs + backward, gradient)

"""Generation: memory, slots of the cache and latency, as `megatron.decoding` and `megatron.generation` work."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_steerlm.config.gpus import Gpu
from nemo_steerlm.plan.job import Job, Stage
from nemo_steerlm.plan.memory import ALLOWANCE
from nemo_steerlm.plan.parameters import stage_parameters
from nemo_steerlm.plan.speed import flops_per_token

#: As in `megatron.decoding`: positions are reserved in blocks, and drawing takes so many bytes a logit.
_BLOCK, _DRAW_BYTES = 64, 64
#: As in `megatron.generation` and `megatron.inference`: tokens that are read at once.
READ_TOKENS = 16384


@dataclass(frozen=True)
class Inference:
    """Generation with a model at a layout, on the GPU with the least room.

    Attributes:
        weights: bytes of the weights.
        reading: bytes of the activations while prompts are read.
        slot: bytes of the cache, and of the logits, of one row.
        slots: rows that decode together at most.
        rows: rows that decode together.
        step: seconds for one token of each row: all weights and the cache are read once.
        first: seconds until the first token of one prompt.
        tokens_per_second: of all rows and data-parallel ranks.
        reading_per_second: tokens that are read a second, by all data-parallel ranks.
    """

    weights: int
    reading: int
    slot: int
    slots: int
    rows: int
    step: float
    first: float
    tokens_per_second: float
    reading_per_second: float

    @property
    def peak(self) -> int:
        """Bytes with all rows."""
        return self.weights + self.reading + self.rows * self.slot


def inference(
    job: Job, gpu: Gpu, mfu: float, *, prompt: int, longest: int, rows: int, read: int = READ_TOKENS
) -> Inference:
    """Generation of `rows` rows of `longest` tokens, `prompt` of which are read, `read` tokens at once.

    Decoding is bound by memory: the time of a step is that of reading the weights of the layers and of the head and
    the filled half of the cache, one stage after the other ("LLM inference is memory-bound": arXiv 2211.05102,
    section 2.1). Reading prompts is bound by products.
    """
    stages = job.stages()
    weights = [_weights(stage) for stage in stages]
    slots = [_slot(stage, longest) for stage in stages]
    reading = _reading(job, max(read, prompt))
    room = [int(gpu.memory * (1 - ALLOWANCE)) - weight - reading for weight in weights]
    most = max(0, min(free // slot for free, slot in zip(room, slots, strict=True)))
    used = min(rows, most)
    cache = sum(used * (slot - job.vocabulary * job.parallel.tensor * _DRAW_BYTES) for slot in slots)
    table = job.width * job.vocabulary * job.architecture.hidden_size
    step = (sum(weights) - table + cache / 2) / gpu.bandwidth  # one row of the embedding is read, not the table
    forward = flops_per_token(job).forward / job.parallel.tensor
    worst = max(range(len(stages)), key=lambda i: weights[i] + slots[i])
    return Inference(
        weights=weights[worst], reading=reading, slot=slots[worst], slots=most, rows=used, step=step,
        first=prompt * forward / (gpu.flops * mfu) + step,
        tokens_per_second=job.ranks * used / step,
        reading_per_second=gpu.flops * mfu / forward * job.ranks,
    )  # fmt: skip


def _weights(stage: Stage) -> int:
    counts = stage_parameters(stage)
    return stage.job.width * (counts.all - counts.head) + 4 * counts.head


def _slot(stage: Stage, longest: int) -> int:
    """As `decoding.slot_bytes`."""
    it, tensor = stage.job.architecture, stage.job.parallel.tensor
    position = (2 * stage.layers + 1) * (it.key_value_heads // tensor) * it.head_size + 1
    blocks = _BLOCK * -(-longest // _BLOCK)
    return blocks * position * stage.job.width + it.vocab_size * _DRAW_BYTES


def _reading(job: Job, tokens: int) -> int:
    """As `decoding.activation_bytes`."""
    it, tensor = job.architecture, job.parallel.tensor
    heads = (it.num_attention_heads + 2 * it.key_value_heads) * it.head_size
    return tokens * (5 * it.hidden_size + 4 * max(it.ffn_hidden_size, heads) // tensor) * job.width

"""A plan for people: one line of verdict, then tables of at most 100 columns."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

from nemo_steerlm.config.gpus import Gpu
from nemo_steerlm.plan.estimate import Estimate
from nemo_steerlm.plan.inference import Inference
from nemo_steerlm.plan.job import Job
from nemo_steerlm.plan.memory import ALLOWANCE, StageMemory
from nemo_steerlm.plan.parameters import model_parameters
from nemo_steerlm.plan.search import Found
from nemo_steerlm.plan.tokens import Data
from nemo_steerlm.report.tables import duration, text_table

_GIB = 2**30
_SHOWN = 10  # layouts of a search


def gib(size: float) -> str:
    """Bytes in GiB, right-aligned."""
    return f"{size / _GIB:8.2f}"


def verdict(found: Estimate) -> str:
    """Whether it fits, in one line."""
    worst, gpu = found.worst, found.gpu
    need = f"{worst.peak / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB on each {gpu.label}"
    kept = f"{found.allowance / _GIB:.1f} GiB kept free"
    if found.margin >= 0:
        return f"fits: {need}, {found.margin / _GIB:.1f} GiB to spare beside {kept}"
    return f"does not fit: {need}, {-found.margin / _GIB:.1f} GiB too much beside {kept}; --search lists what fits"


def training(found: Estimate, data: Data | None) -> str:
    """The plan of a training."""
    memory = "GiB on one GPU of a stage\n" + _memory(found)
    return "\n\n".join([verdict(found), _facts(found, data), memory, _times(found)])


def _facts(found: Estimate, data: Data | None) -> str:
    job, parallel = found.job, found.job.parallel
    all_, own = model_parameters(job)
    trained = "all trained" if job.trained == "all" else f"{_count(own)} trained ({job.trained})"
    shape = f"{job.length} tokens packed" if job.packed else f"{job.rows} x {job.length} tokens"
    layout = f"tensor {parallel.tensor}{' with sequence' if parallel.sequence else ''} x pipeline {parallel.pipeline}"
    if parallel.virtual_pipeline:
        layout += f" ({parallel.virtual_pipeline} chunks each)"
    rows = [
        ("model", f"{_count(all_)} parameters, {trained}, {'bf16' if job.width == 2 else 'fp32'}"),
        ("layout", f"{_gpus(job)} = {layout} x data {job.ranks}"),
        ("batch", f"{job.batch} samples of {job.sample:,.0f} tokens = {job.micro_batches} micro-batches of {shape} on "
                  "each rank"),
        ("recompute", job.recompute),
    ]  # fmt: skip
    if data is not None:
        rows.append(("data", f"{data.samples:,} samples, {data.tokens:,} tokens ({data.source})"))
    if data is not None and data.padding:
        rows.append(("padding", f"{data.padding:.0%} of the computed tokens without packing; packed rows have next to "
                                "none"))  # fmt: skip
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _named(found: Estimate) -> list[tuple[str, StageMemory]]:
    """The first stage, the fullest one between, and the last."""
    stages = found.stages
    if len(stages) == 1:
        return [("all", stages[0])]
    middle = [("middle", max(stages[1:-1], key=lambda stage: stage.peak))] if len(stages) > 2 else []
    return [("first", stages[0]), *middle, ("last", stages[-1])]


def _memory(found: Estimate) -> str:
    headers = ["stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "(logits)", "sum"]
    rows = [
        [
            name, f"{stage.stage.layers:6}", f"{_count(stage.parameters.all):>10}", gib(stage.weights),
            gib(stage.gradients), gib(stage.optimizer + stage.average), gib(stage.activations.peak),
            gib(stage.activations.logits), gib(stage.peak),
        ]
        for name, stage in _named(found)
    ]  # fmt: skip
    return text_table(rows, headers)


def _times(found: Estimate) -> str:
    time, job, stored = found.time, found.job, found.storage
    parts = [
        f"{field.name} {getattr(time, field.name) / time.total:.0%}"
        for field in dataclasses.fields(time)
        if getattr(time, field.name) / time.total >= 0.005
    ]
    flops = found.flops
    rows = [
        ("step", f"{duration(time.total)}: {', '.join(parts)}"),
        ("speed", f"{found.tokens_per_second:,.0f} tokens/s, {found.tokens_per_second / job.world:,.0f} on each GPU; "
                  f"MFU {found.mfu_reached:.0%} at products of {found.mfu:.0%}"),
        ("FLOPs", f"{flops.model / 1e9:,.1f} GFLOP a token, {flops.recomputed / 1e9:,.1f} recomputed"),
        ("saving", f"{gib(found.worst.saving).strip()} GiB on the GPU, {stored.host / _GIB:.0f} GiB of host "
                   "memory a node"),
        ("disk", f"{stored.checkpoint / 1e9:,.1f} GB a checkpoint, {stored.model / 1e9:,.1f} GB for model/"),
    ]  # fmt: skip
    if found.steps is not None and found.hours is not None:
        rows.append(("run", f"{found.steps:,} steps, {_hours(found.hours * 3600, job, found.price)}"))
    rows.append(("generation", generation(found)))
    return "\n".join(f"{name:<11}{text}" for name, text in rows)


def generation(found: Estimate) -> str:
    """Generation at the job's layout, in one line."""
    it = found.inference
    if not it.slots:
        return f"does not fit at this layout: {it.weights / _GIB:.1f} GiB of weights on each GPU"
    return (
        f"{it.weights / _GIB:.1f} GiB of weights, {it.slots:,} rows fit; {it.rows} rows: at least "
        f"{it.step * 1e3:.0f} ms a token, at most {it.tokens_per_second:,.0f} tokens/s"
    )


def measured(found: Estimate, pairs: Sequence[tuple[StageMemory, Any]]) -> str:
    """Estimated beside measured memory, by part, of stages.

    Args:
        pairs: what is estimated of a stage, and the `fake_gpu.dry_run.Measured` of the same micro-batches.
    """
    rows = []
    for own, taken in pairs:
        parts = dict(taken.parts)
        for name, size, part in (
            ("weights", own.weights, "parameters"), ("gradients", own.gradients, "gradient buffers"),
            ("optimizer", own.optimizer, "optimizer"), ("average", own.average, "average"),
        ):  # fmt: skip
            if size or parts.get(part):
                rows.append(_compared(own, name, size, parts.pop(part, 0)))
        rows.append(_compared(own, "activations", own.activations.peak, sum(parts.values())))
        rows.append(_compared(own, "sum", own.peak, taken.peak))
        rows.append(_compared(own, "saving", own.saving, taken.saving))
    return "\n\n".join([verdict(found), text_table(rows, ["stage", "GiB", "estimated", "measured", "ratio"]),
                        "measured allocation, without context, NCCL and workspaces"])  # fmt: skip


def _compared(own: StageMemory, name: str, estimated: int, taken: int) -> list[Any]:
    return [own.stage.index, name, gib(estimated), gib(taken), f"{estimated / max(taken, 1):.3f}"]


def reading(job: Job, gpu: Gpu, it: Inference, tokens: float | None, price: float | None) -> str:
    """The plan of `annotate`."""
    rows = [
        ("memory", f"{it.weights / _GIB:.1f} GiB of weights, {it.reading / _GIB:.1f} GiB while reading"),
        ("speed", f"{it.reading_per_second:,.0f} tokens/s over {_gpus(job)}"),
    ]
    if tokens is not None:
        rows.append(("run", _hours(tokens / it.reading_per_second, job, price)))
    return _inference(gpu, it.weights + it.reading, rows)


def generating(job: Job, gpu: Gpu, it: Inference, drawn: float | None, price: float | None) -> str:
    """The plan of `sample` and `generate`; `drawn` tokens are drawn in all, None for one answer."""
    rows = [
        ("memory", f"{it.weights / _GIB:.1f} GiB of weights, {it.reading / _GIB:.1f} GiB while reading prompts, "
                   f"{it.slot / _GIB:.2f} GiB a row"),
        ("cache", f"{it.slots:,} rows fit at once, {it.rows} are used"),
        ("latency", f"at least {it.first * 1e3:,.0f} ms to the first token, {it.step * 1e3:,.1f} ms for each more"),
        ("speed", f"at most {it.tokens_per_second:,.0f} tokens/s over {_gpus(job)}"),
    ]  # fmt: skip
    if drawn is not None and it.rows:
        rows.append(("run", "at least " + _hours(drawn / it.tokens_per_second, job, price)))
    return _inference(gpu, it.weights + it.reading + max(it.rows, 1) * it.slot, rows)


def _inference(gpu: Gpu, need: float, rows: list[tuple[str, str]]) -> str:
    fits = "fits" if need <= gpu.memory * (1 - ALLOWANCE) else "does not fit"
    said = f"{fits}: {need / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB on each {gpu.label}, {ALLOWANCE:.0%} kept free"
    return "\n\n".join([said, "\n".join(f"{name:<11}{text}" for name, text in rows)])


def _hours(seconds: float, job: Job, price: float | None) -> str:
    hours = seconds / 3600 * job.world
    cost = "" if price is None else f", price {hours * price:,.2f}"
    return f"{duration(seconds)}, {hours:,.1f} GPU-hours{cost}"


def layouts(found: list[Found], current: Job, count: int = _SHOWN) -> str:
    """The best layouts of a search, each with the words to add to the command whose job is `current`."""
    lines = [f"{len(found)} layouts fit"]
    for place, one in enumerate(found[:count], 1):
        lines.append(
            f"{place:2}. {one.tokens_per_second:>10,.0f} tokens/s  {one.peak / _GIB:6.1f} GiB, "
            f"{one.margin / _GIB:.1f} to spare  bubble {one.bubble_share:.0%}  data {one.job.ranks}"
        )
        lines += ["    " + line for line in " \\\n".join(textwrap.wrap(one.words(current), 94)).splitlines()]
    return "\n".join(lines)


def _gpus(job: Job) -> str:
    return "1 GPU" if job.world == 1 else f"{job.world} GPUs"

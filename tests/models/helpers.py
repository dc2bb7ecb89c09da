"""Small models and random batches shared by the model tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from nemo_steerlm.config import Architecture, LoggingConfig, OptimizerConfig, ParallelConfig, TrainerConfig

ARCHITECTURE = Architecture(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=8, num_query_groups=4,
    vocab_size=500, max_position_embeddings=128,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1)
GLOBAL_BATCH = 8
ATTRIBUTES = ("quality", "humor", "verbosity")


class NumberTokenizer:
    """Token ids written as decimal numbers: enough where only ids matter."""

    vocab_size, pad_id, eos_id, bos_id, fingerprint = 500, 0, None, None, "numbers"
    holes: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write something to read back."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "numbers.txt").write_text("numbers")

    def encode_continuations(self, texts: list[str]) -> list[list[int]]:
        """One id a character."""
        return [[300 + ord(character) for character in text] for text in texts]

    def decode_continuation(self, ids: list[int]) -> str:
        """The numbers."""
        return " ".join(map(str, ids))

    def token_id(self, text: str) -> int | None:
        """Its id where it is one character, or a level of `make_model`'s attributes."""
        if len(text) == 1:
            return self.encode_continuations([text])[0][0]
        name, _, level = text.partition(":")
        return 100 * (1 + ATTRIBUTES.index(name)) + int(level) if name in ATTRIBUTES else None


def random_items(kind: str, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Items of 5 to 40 random tokens with a loss mask or with labels, some of them missing."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        length = int(rng.integers(5, 41))
        item: dict[str, np.ndarray] = {"tokens": rng.integers(1, 500, length)}
        if kind == "policy":
            mask = rng.random(length) < 0.5
            mask[0] = False
            item["loss_mask"] = mask
        else:
            labels = rng.uniform(0, 4, 3).astype(np.float32)
            labels[rng.random(3) < 0.3] = np.nan
            item["labels"] = labels
        items.append(item)
    return items


def make_task(model: Any) -> Any:
    """What a model of this kind is trained on."""
    from nemo_steerlm.train.tasks import ConditionedSFTTask, GenerativeTask, RegressionTask

    if model.kind == "policy":
        return ConditionedSFTTask(model)
    return GenerativeTask(model) if model.card.head == "generative" else RegressionTask(model)


def with_label_strings(model: Any, items: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The items as `model` wants them: a generative regressor's end with their attribute string."""
    if model.card.head != "generative":
        return items
    strings = [model.strings.encode(item["labels"].tolist())[0] for item in items]
    return [{**item, "tokens": np.append(item["tokens"], ids)} for item, ids in zip(items, strings, strict=True)]


def random_units(items: list[dict[str, Any]], pairs: int, seed: int = 0) -> np.ndarray:
    """Units of the items of which the first `pairs` are preferred, each to one from the end, by 1 to 3."""
    strengths = np.random.default_rng(seed).uniform(1, 3, pairs)
    for number, item in enumerate(items):
        item["strength"] = np.float32(strengths[number] if number < pairs else np.nan)
        item["label_count"] = np.float32([1, 3, np.nan][number % 3])
    rest = [(index, -1) for index in range(pairs, len(items) - pairs)]
    return np.array([(index, len(items) - 1 - index) for index in range(pairs)] + rest)


def make_model(
    kind: str,
    parallel: ParallelConfig,
    *,
    architecture: Architecture = ARCHITECTURE,
    head: str = "regression",
    pooling: str = "last",
    **training: Any,
) -> Any:
    """A regressor of three attributes or a policy, with the training settings of these tests."""
    from omegaconf import OmegaConf

    from nemo_steerlm.attributes import AttributeSchema
    from nemo_steerlm.formats.model_folder import ModelCard
    from nemo_steerlm.models.base import model_config
    from nemo_steerlm.tokenizer import Tokenizer

    schema = AttributeSchema.load({name: {"low": 0, "high": 4} for name in ATTRIBUTES})
    settings = {"optimizer": OmegaConf.to_container(OmegaConf.structured(OPTIMIZER)), "max_steps": 4, "seed": 1}
    if kind == "regressor":
        from nemo_steerlm.models.regressor import AttributeRegressor as cls
    else:
        from nemo_steerlm.models.policy import AttributeConditionedGPT as cls  # type: ignore[assignment]
    card = ModelCard(kind=kind, architecture=architecture, schema=schema, head=head, pooling=pooling)
    cfg = model_config(card, parallel=parallel, **{**settings, **training})
    model = cls.variant(card)(cfg, cast(Tokenizer, NumberTokenizer()))
    model.task = make_task(model)  # `begin` gives another
    return model


def make_batches(
    kind: str,
    items: list,
    *,
    steps: int,
    micro_batch_size: int,
    parallel: ParallelConfig,
    once: bool = False,
    pack_length: int | None = None,
    units: np.ndarray | None = None,
    task: Any = None,
) -> Any:
    """Batches of this rank over the items, in order or once through."""
    from functools import partial

    from megatron.core import parallel_state

    from nemo_steerlm.data.units import unit_lengths
    from nemo_steerlm.train import batches

    cutting = batches.MicroBatching(
        micro_batch_size=micro_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        equal_lengths=parallel.pipeline > 1,
        pack_length=pack_length,
        count_multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
    )

    def in_order(step: int) -> list[tuple[int, int]]:
        return [((step * GLOBAL_BATCH + i) % count, 0) for i in range(GLOBAL_BATCH)]

    lengths = np.array([len(item["tokens"]) for item in items])
    count, totals = (len(items), lengths) if units is None else (len(units), unit_lengths(lengths, units))
    collate = batches.collate_policy if kind == "policy" else partial(batches.collate_regression, outputs=3)
    if task is not None:
        collate = task.collate
    return batches.StepBatches(
        batches.once_through(totals, GLOBAL_BATCH) if once else in_order,
        lambda index, epoch: items[index],
        lengths,
        collate,
        cutting,
        steps,
        units,
    )


def train(
    kind: str,
    output: Path,
    *,
    init: Path | None,
    parallel: ParallelConfig,
    micro_batch_size: int = 2,
    steps: int = 4,
    checkpoint_every: int | None = None,
    validate: bool = True,
    precision: str = "fp32",
    resume: bool = True,
    pack_length: int | None = None,
    async_checkpoint: bool = False,
    pairs: int = 0,
    straggler_every: int | None = None,
    prepare: Callable[[Any], None] | None = None,
    make_task: Callable[[Any], Any] = make_task,
    inspect: Callable[[Any], None] | None = None,
    **training: Any,
) -> list[dict]:
    """Train through the real Lightning loop; return the lines of metrics.jsonl.

    `prepare` sees the model before, `inspect` the trained one; `make_task` makes the task of a model; of the items
    `pairs` are preferred to another.
    """
    from nemo_steerlm.megatron import parallel as processes
    from nemo_steerlm.train.bad_steps import BadSteps
    from nemo_steerlm.train.fit import fit

    processes.initialize(parallel, seed=1)
    model = make_model(kind, parallel, precision=precision, max_steps=steps, **training)
    model.build()
    if init is not None:
        from nemo_steerlm.megatron import checkpoint

        state = checkpoint.load(init, checkpoint.model_state(model.chunks))
        checkpoint.load_model_state(model.chunks, state)
    if prepare is not None:
        prepare(model)
    task = make_task(model)
    cut: dict[str, Any] = dict(
        micro_batch_size=micro_batch_size, parallel=parallel, pack_length=pack_length, task=task
    )  # fmt: skip
    items = with_label_strings(model, random_items(kind, 20))
    units = random_units(items, pairs) if pairs else None
    training, held_out = make_batches(kind, items, steps=steps, units=units, **cut), None
    if validate:
        items = with_label_strings(model, random_items(kind, 11 + pairs, seed=1))
        units = random_units(items, pairs, seed=1) if pairs else None
        held_out = make_batches(kind, items, steps=2, once=True, units=units, **cut)
    model.begin(task, training, held_out, bad_steps=BadSteps())
    config = TrainerConfig(
        max_steps=steps, val_every=2, checkpoint_every=checkpoint_every, async_checkpoint=async_checkpoint,
        progress_bar=False,
    )  # fmt: skip
    fit(model, config, LoggingConfig(tensorboard=False, straggler_every=straggler_every), output, resume=resume)
    if inspect is not None:
        inspect(model)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]

"""Annotation, from a file of conversations to a file with values, beside what one would write with transformers.

All sides read the same responses, cut to the same length. The responses of a conversation, and the threads of a tree,
begin alike; the regressor reads what they share once, and its peers, as one would write them, each response in full.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.measure import Row, compare

CONVERSATIONS = 200
BATCH = 16
MAX_LENGTH = 1024
INPUT, WARM_UP = "to-annotate.jsonl", "to-warm-up.jsonl"
UNIT = "responses"


def rows(folder: Path, runs: int) -> Iterator[Row]:
    """Measure everything here; `folder` holds the inputs."""
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for path, count in ((folder / WARM_UP, CONVERSATIONS // 10), (folder / INPUT, CONVERSATIONS)):
        path.write_text("".join(lines[:count]), encoding="utf-8")
    peers = {
        "annotate vs length-sorted transformers batches": (sorted_batches, 1.1),
        "annotate vs one conversation at a time": (one_at_a_time, 3.0),
    }
    yield from compare(ours, peers, folder=folder, runs=runs, unit=UNIT)


def regressor(folder: Path) -> Any:
    """A regressor with random weights, whose model folder is made once."""
    from nemo_steerlm import config as configs
    from nemo_steerlm.attributes import AttributeSchema
    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.train.start import start_model

    parallel.initialize()
    if not (folder / "regressor").is_dir():
        training = configs.TrainRegressorConfig(
            output="", data=configs.DataConfig(train=""), optimizer=configs.OptimizerConfig(lr=0.0),
            model=configs.RegressorModelConfig(init=str(folder / "llama")),
            trainer=configs.TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
        )  # fmt: skip
        start_model(AttributeRegressor, training, AttributeSchema.load(inputs.preset())).save_pretrained(
            folder / "regressor"
        )
    return AttributeRegressor.from_pretrained(folder / "regressor")


def ours(folder: Path) -> Iterator[float]:
    """Responses a second of `steerlm annotate` with a loaded model."""
    from nemo_steerlm import config as configs
    from nemo_steerlm.verbs.annotate import annotate

    model = regressor(folder)
    for name in _files():
        with tempfile.TemporaryDirectory() as output:
            config = configs.AnnotateConfig(
                checkpoint=str(folder / "regressor"), input=str(folder / name),
                output=f"{output}/labelled.jsonl", max_length=MAX_LENGTH,
                trainer=configs.ComputeConfig(),
            )  # fmt: skip
            started = time.perf_counter()
            report = annotate(model, config)
            yield report["responses"] / (time.perf_counter() - started)


def sorted_batches(folder: Path) -> Iterator[float]:
    """Responses a second of transformers over batches of `BATCH`, sorted by length so that padding is small."""
    yield from _transformers(folder, BATCH)


def one_at_a_time(folder: Path) -> Iterator[float]:
    """Responses a second of transformers, one response a forward pass, as NeMo-Aligner's script asks its server."""
    yield from _transformers(folder, 1)


def _transformers(folder: Path, batch: int) -> Iterator[float]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder / "llama", dtype="float32", num_labels=9, pad_token_id=tokenizer.pad_token_id
    ).eval()
    for name in _files():
        started = time.perf_counter()
        texts = list(_texts(folder / name))
        ids = [row[:MAX_LENGTH] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if batch > 1 else range(len(ids))
        values = np.zeros((len(ids), 9))
        for start in range(0, len(ids), batch):
            places = list(itertools.islice(order, start, start + batch))
            inputs_ = tokenizer.pad({"input_ids": [ids[i] for i in places]}, return_tensors="pt")
            with torch.inference_mode():
                values[places] = model(**inputs_).logits.numpy()
        with tempfile.NamedTemporaryFile("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in values.tolist())
        yield len(ids) / (time.perf_counter() - started)


def _files() -> Iterator[str]:
    """What the runs read: the first one, which warms up, a tenth."""
    return itertools.chain([WARM_UP], itertools.repeat(INPUT))


def _texts(path: Path) -> Iterator[str]:
    """What a regressor reads for each response."""
    from nemo_steerlm.conversation import read_conversations
    from nemo_steerlm.template import PromptTemplate

    template = PromptTemplate()
    for row in read_conversations(path):
        for turn in row.response_indices:
            yield template.render_regression(row, turn)

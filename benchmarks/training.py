"""Training beside transformers' Trainer and TRL's SFTTrainer: the same weights, samples, loss mask and batch sizes.

A run is one pass over a fixed set of samples; its rate is their real tokens over the time from the start of the
training loop to the end of the last optimizer step.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inputs
from benchmarks.measure import Row, compare

SAMPLES, GLOBAL_BATCH, MICRO_BATCH = 32, 16, 8
DENSE, DENSE_LENGTH = 32, 256
MAX_LENGTH, PACK_LENGTH = 1024, 2048
UNIT = "real tokens"


def rows(folder: Path, runs: int) -> Iterator[Row]:
    """Measure everything here; `folder` holds the inputs."""
    settings = dict(folder=folder, runs=runs, unit=UNIT)
    dense = dict(kind="policy", dense=DENSE, **settings | {"runs": 3 * runs})  # the closest race, and runs of seconds
    peer = transformers_trainer
    yield from compare(ours, {"train step, dense, fp32, vs transformers": (peer, 1.0)}, precision="fp32", **dense)
    peers = {
        "policy, OASST lengths, packed vs TRL padded": (trl_padded, 1.6),
        "policy, OASST lengths, packed vs TRL packed": (trl_packed, 1.0),
    }
    yield from compare(ours, peers, kind="policy", precision="fp32", **settings)
    peers = {"regressor, OASST lengths, packed vs transformers padded": (peer, 1.6)}
    yield from compare(ours, peers, kind="regressor", precision="fp32", **settings)
    if not _bf16_units():
        print("bf16 training is not measured: this processor has no bf16 units, both sides would only emulate them")
        return
    yield from compare(ours, {"train step, dense, bf16, vs transformers": (peer, 1.0)}, precision="bf16", **dense)


def _bf16_units() -> bool:
    """Whether the processor multiplies bf16 itself; where it does not, both sides emulate it."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# -- the samples ------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """A dataset in memory, as one part of a `nemo_steerlm.data.mixture.Mixture`."""

    items: list[dict[str, np.ndarray]]
    outputs: int = 0
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.lengths = np.array([len(item["tokens"]) for item in self.items])
        self.units = np.array([(index, -1) for index in range(len(self.items))])  # each on its own
        self.report: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        """One sample, the same in every epoch."""
        return self.items[index]


def samples(folder: Path, kind: str, dense: int) -> Samples:
    """The first `SAMPLES` samples of the conversations, or `dense` rows of random tokens that are all targets."""
    if dense:
        return Samples(inputs.dense_items(dense, DENSE_LENGTH))
    from nemo_steerlm.attributes import AttributeSchema
    from nemo_steerlm.conversation import read_conversations
    from nemo_steerlm.data.policy_dataset import PolicyDataset
    from nemo_steerlm.data.regression_dataset import RegressionDataset
    from nemo_steerlm.template import PromptTemplate
    from nemo_steerlm.tokenizer import load_tokenizer

    schema = AttributeSchema.load(inputs.preset())
    cls = PolicyDataset if kind == "policy" else RegressionDataset
    conversations = read_conversations(folder / "conversations.jsonl", schema)
    tokenizer = load_tokenizer(folder / "llama")
    built = cls.build(conversations, schema, PromptTemplate(), tokenizer, MAX_LENGTH, "drop")
    items = [built.item(index, 0) for index in range(min(SAMPLES, len(built)))]
    return Samples(items, len(schema.names), tuple(getattr(built, "datasets", ())))


# -- ours -------------------------------------------------------------------------------------------------------------


def ours(folder: Path, kind: str, precision: str, dense: int = 0) -> Iterator[float]:
    """Real tokens a second of our training loop; packed unless all samples are of one length."""
    pack_length = None if dense else PACK_LENGTH
    yield from passes(folder, kind, precision, samples(folder, kind, dense), GLOBAL_BATCH, MAX_LENGTH, pack_length)


def passes(
    folder: Path, kind: str, precision: str, data: Samples, batch: int, max_length: int, pack_length: int | None
) -> Iterator[float]:
    """As `ours` on samples of one's own: `batch` of them a step, in packed rows of at most `pack_length` tokens."""
    from nemo_steerlm import config as configs
    from nemo_steerlm.attributes import AttributeSchema
    from nemo_steerlm.data.mixture import Mixture
    from nemo_steerlm.megatron import parallel
    from nemo_steerlm.models.policy import AttributeConditionedGPT
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.train.fit import train
    from nemo_steerlm.train.start import start_model
    from nemo_steerlm.train.tasks import ConditionedSFTTask, RegressionTask

    policy = kind == "policy"
    trainer = configs.TrainerConfig(
        max_epochs=1, global_batch_size=batch, micro_batch_size=min(batch, MICRO_BATCH), precision=precision,
        progress_bar=False,
    )  # fmt: skip
    data_config = configs.PolicyDataConfig if policy else configs.DataConfig
    config = (configs.TrainSftConfig if policy else configs.TrainRegressorConfig)(
        output="", trainer=trainer, optimizer=configs.OptimizerConfig(lr=1e-5),
        model=(configs.ModelConfig if policy else configs.RegressorModelConfig)(init=str(folder / "llama")),
        data=data_config(train="", max_length=max_length, packing=pack_length is not None, pack_length=pack_length),
        logging=configs.LoggingConfig(tensorboard=False),
    )  # fmt: skip
    parallel.initialize(config.parallel, config.seed)
    model = start_model(
        AttributeConditionedGPT if policy else AttributeRegressor, config, AttributeSchema.load(inputs.preset())
    )
    task = (ConditionedSFTTask if policy else RegressionTask)(model)
    mixture: Any = Mixture([data])  # type: ignore[list-item]
    times: list[float] = []
    step = model.training_step

    def timed_step(*arguments: Any) -> None:
        step(*arguments)
        times.append(time.perf_counter())

    model.on_train_start = lambda: times.append(time.perf_counter())
    model.training_step = timed_step
    while True:
        with tempfile.TemporaryDirectory() as output:
            times.clear()
            config.output = output
            train(task, config, mixture, None)
        yield float(data.lengths.sum()) / (times[-1] - times[0])


# -- the peers --------------------------------------------------------------------------------------------------------


def transformers_trainer(folder: Path, kind: str, precision: str, dense: int = 0) -> Iterator[float]:
    """Real tokens a second of transformers' Trainer on padded batches."""
    from transformers import Trainer, TrainingArguments

    data = samples(folder, kind, dense)
    model = _pretrained(folder, kind, data.outputs)
    records = [_record(item) for item in data.items]
    yield from _epochs(
        lambda output, callback: Trainer(
            model, TrainingArguments(**_arguments(output, precision)), train_dataset=records, callbacks=[callback],
            data_collator=partial(_padded, policy=kind == "policy"),
        ),
        data,
    )  # fmt: skip


def trl_padded(folder: Path, kind: str, precision: str) -> Iterator[float]:
    """Real tokens a second of TRL's SFTTrainer as it is by default."""
    yield from _trl(folder, precision, packing=False)


def trl_packed(folder: Path, kind: str, precision: str) -> Iterator[float]:
    """Real tokens a second of TRL's SFTTrainer with `packing=True`."""
    yield from _trl(folder, precision, packing=True)


def _trl(folder: Path, precision: str, packing: bool) -> Iterator[float]:
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    data = samples(folder, "policy", dense=0)
    model, tokenizer = _pretrained(folder, "policy", 0), AutoTokenizer.from_pretrained(folder / "llama")
    columns = {
        "input_ids": [item["tokens"].tolist() for item in data.items],
        "completion_mask": [item["loss_mask"].astype(int).tolist() for item in data.items],
    }
    # A packed row holds several samples: fewer rows a batch, so that an optimizer step sees as many samples.
    arguments = dict(max_length=MAX_LENGTH, packing=packing, gradient_checkpointing=False)
    if packing:
        per_row = max(1, round(MAX_LENGTH / data.lengths.mean()))
        arguments |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=max(1, GLOBAL_BATCH // per_row))
    yield from _epochs(
        lambda output, callback: SFTTrainer(
            model, SFTConfig(**_arguments(output, precision) | arguments), callbacks=[callback],
            train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer,
        ),
        data,
    )  # fmt: skip


def _epochs(make: Any, data: Samples) -> Iterator[float]:
    """Train one epoch after another, each with a new trainer on the same model."""
    from transformers import TrainerCallback
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end = time.perf_counter()

    while True:
        clock = Clock()
        with tempfile.TemporaryDirectory() as output:
            make(output, clock).train()
        yield float(data.lengths.sum()) / (clock.end - clock.begin)


def _arguments(output: str, precision: str) -> dict[str, Any]:
    return dict(
        output_dir=output, num_train_epochs=1, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH, learning_rate=1e-5, max_grad_norm=1.0, use_cpu=True,
        bf16=precision == "bf16", save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip


def _pretrained(folder: Path, kind: str, outputs: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "policy":
        return AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="float32")
    return AutoModelForSequenceClassification.from_pretrained(
        folder / "llama", dtype="float32", num_labels=outputs, problem_type="regression", pad_token_id=0
    )


def _record(item: dict[str, np.ndarray]) -> dict[str, Any]:
    if "labels" in item:
        return {"input_ids": item["tokens"], "labels": np.nan_to_num(item["labels"])}
    return {"input_ids": item["tokens"], "labels": np.where(item["loss_mask"], item["tokens"], -100)}


def _padded(records: list[dict[str, Any]], policy: bool) -> dict[str, Any]:
    """A batch padded on the right to its longest sample."""
    import torch

    def pad(name: str, value: int) -> Any:
        rows = [torch.as_tensor(np.asarray(record[name])) for record in records]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)  # token 0 is the pad token and occurs nowhere else
    lengths = torch.tensor([len(record["input_ids"]) for record in records])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    labels = pad("labels", -100) if policy else torch.tensor(np.stack([record["labels"] for record in records]))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

"""A very small world for tests of the steps: data, tokenizer, and the settings of a model of 30,000 parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import (
    Architecture,
    AttributesConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyDataConfig,
    PrepareConfig,
    RegressorModelConfig,
    TrainerConfig,
    TrainRegressorConfig,
    TrainSftConfig,
)
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data.sources import synthetic
from nemo_steerlm.data.train_tokenizer import corpus, train_tokenizer
from nemo_steerlm.template import PromptTemplate

SCHEMA = AttributeSchema.load("synthetic")
SIZES = synthetic.SyntheticSizes(train=60, val=11, unlabelled=40, test=20, prompts=12, prompts_test=12)


def make_world(folder: Path) -> None:
    """Write the synthetic data and a tokenizer trained on it."""
    (folder / "data").mkdir(parents=True)
    synthetic.write(PrepareConfig(source="synthetic", output=str(folder / "data"), seed=3), SCHEMA, SIZES)
    texts = corpus(read_conversations(folder / "data" / "train.jsonl"), PromptTemplate())
    train_tokenizer(texts, 400, PromptTemplate(), SCHEMA, folder / "tokenizer")


def _common(folder: Path, output: str, steps: int, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        output=str(folder / output),
        attributes=AttributesConfig(preset="synthetic"),
        trainer=TrainerConfig(
            max_steps=steps,
            global_batch_size=8,
            micro_batch_size=4,
            val_every=3,
            checkpoint_every=2,
            progress_bar=False,
        ),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2),
        logging=LoggingConfig(tensorboard=False),
        seed=5,
    )
    return {**settings, **changes}


def _weights(folder: Path) -> dict[str, Any]:
    architecture = Architecture(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
        max_position_embeddings=512, tie_word_embeddings=True, hidden_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    return {"architecture": architecture, "tokenizer": str(folder / "tokenizer")}


def regressor_config(folder: Path, output: str = "regressor", steps: int = 10, **changes: Any) -> TrainRegressorConfig:
    """Train a regressor on the human labels; ten steps of eight rows pass the border of an epoch of sixty."""
    data = DataConfig(train=str(folder / "data/train.jsonl"), val=str(folder / "data/val.jsonl"), max_length=256)
    settings = {"data": data, "model": RegressorModelConfig(**_weights(folder), head_init="mean"), **changes}
    return TrainRegressorConfig(**_common(folder, output, steps, **settings))


def policy_config(folder: Path, output: str = "policy", steps: int = 10, **changes: Any) -> TrainSftConfig:
    """Train a policy on the same rows, with dropout of attributes and labels."""
    data = PolicyDataConfig(
        train=str(folder / "data/train.jsonl"), val=str(folder / "data/val.jsonl"), max_length=256,
        attribute_dropout=0.2, label_dropout=0.1,
    )  # fmt: skip
    settings = {"data": data, "model": ModelConfig(**_weights(folder)), **changes}
    return TrainSftConfig(**_common(folder, output, steps, **settings))


def weights_of(folder: Path) -> dict[str, Any]:
    """All tensors of a model folder, read without building the model."""
    from megatron.core import dist_checkpointing

    from nemo_steerlm.config import ParallelConfig
    from nemo_steerlm.megatron import parallel

    parallel.initialize(ParallelConfig())
    return _flat(dist_checkpointing.load_plain_tensors(str(folder / "weights")))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Tensors of nested dicts under dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: tensor for k, v in value.items() for key, tensor in _flat(v, f"{name}.{k}").items()}

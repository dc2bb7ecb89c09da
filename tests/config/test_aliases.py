"""A name of another library is answered with ours."""

from __future__ import annotations

import pytest

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.config.aliases import ALIASES
from nemo_steerlm.config.schema import keys
from nemo_steerlm.errors import ConfigError

SCHEMAS = {verb: getattr(config, row[1]) for verb, row in VERBS.items()}


def test_every_target_is_a_key_of_a_verb_and_no_alias_is_one_everywhere_it_would_suggest() -> None:
    known = {verb: set(keys(schema)) for verb, schema in SCHEMAS.items()}
    assert {ours for targets in ALIASES.values() for ours in targets} <= set().union(*known.values())
    for name, targets in ALIASES.items():
        assert not any(name in of and targets[0] in of for of in known.values()), name


@pytest.mark.parametrize(
    ("verb", "name", "ours"),
    [
        ("train-sft", "learning_rate", "optimizer.lr"),
        ("train-sft", "trainer.sft.max_steps", "trainer.max_steps"),
        ("train-sft", "model.tensor_model_parallel_size", "parallel.tensor"),
        ("train-regressor", "per_device_train_batch_size", "trainer.micro_batch_size"),
        ("train-regressor", "num_train_epochs", "trainer.max_epochs"),
        ("annotate", "max_seq_length", "max_length"),
        ("evaluate", "model_name_or_path", "checkpoint"),
    ],
)
def test_the_key_that_was_meant_is_suggested(verb: str, name: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose.load(verb, SCHEMAS[verb], [f"{name}=1"])
    assert str(caught.value) == f"unknown key '{name}'; did you mean '{ours}'?"

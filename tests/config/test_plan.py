"""Which words of `steerlm plan` are its own, and which its GPUs are."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.config.plan import PlanConfig, divide, find_gpu
from nemo_steerlm.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "own", "theirs"),
    [
        ("price=2 sample checkpoint=m seed=3", "price=2 verb=sample", "checkpoint=m seed=3"),
        ("model=llama2_13b gpu=h100_80g", "gpu=h100_80g verb=train-sft", "model=llama2_13b"),
        ("data=context_4096 data=train.jsonl", "data=train.jsonl verb=train-sft", "data=context_4096"),
        ("train-regressor data=context_512 --json", "json=true verb=train-regressor", "data=context_512"),
        ("--search train-sft --config-dir mine model=m", "--config-dir mine search=true verb=train-sft",
         "model=m --config-dir mine"),
        ("verb=generate checkpoint=m", "verb=generate", "checkpoint=m"),
        ("--help", "--help verb=train-sft", "--help"),
    ],
    ids=str,
)  # fmt: skip
def test_words_are_divided(words: str, own: str, theirs: str) -> None:
    assert divide(words.split()) == (own.split(), theirs.split())


def test_an_experiment_names_its_verb() -> None:
    own, _ = divide(["experiment=llama2_13b-regressor-oasst-8xh100_80g"])
    assert own == ["verb=train-regressor"]


def test_an_experiment_of_the_user_names_its_verb(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# Mine.\n#   steerlm annotate experiment=mine\n")
    own, _ = divide(["experiment=mine", "--config-dir", str(tmp_path)])
    assert own[-1] == "verb=annotate"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian-sft model=m", "'trian-sft' cannot be planned; did you mean 'train-sft'"),
        ("export checkpoint=m", "there are train-sft, train-regressor, annotate, sample, generate"),
        ("--quick", "unknown option '--quick'"),
        ("experiment=none", "no such experiment"),
    ],
    ids=str,
)
def test_mistakes_are_named(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        divide(words.split())


def test_a_gpu_has_a_name_or_figures() -> None:
    assert find_gpu("a100_80g") is GPUS["a100_80g"]
    own = find_gpu("96/1000/4.5")
    assert (own.memory, own.flops, own.bandwidth) == (96e9, 1e15, 4.5e12)
    for name, said in (("h100", "did you mean 'h100_80g'"), ("96GB", "gpu=96/1000/4")):
        with pytest.raises(ConfigError, match=said):
            PlanConfig(gpu=name).validate()


def test_a_data_set_has_one_source() -> None:
    for config, said in (
        (PlanConfig(data="train.jsonl", samples=3), "leave out samples and tokens"),
        (PlanConfig(tokens=100), "needs samples=N"),
        (PlanConfig(mfu=1.5), "mfu=1.5"),
    ):
        with pytest.raises(ConfigError, match=said):
            config.validate()

"""The options that Hydra's users know, and the user's own configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.config import show as shown
from nemo_steerlm.config.options import parse
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.provenance import plain

SFT = ["data.train=t.jsonl", "output=o", "trainer.max_steps=4", "attributes=helpsteer", "model.init=m"]

LONG = "# @package _global_\noptimizer: {beta2: 0.5}\ntrainer: {val_every: 8}\n"


def load(*words: str, verb: str = "train-sft") -> Any:
    options = parse(verb, words)
    schema = getattr(config, VERBS[verb][1])
    return compose.load(verb, schema, options.words, options.config_dir, config=options.config)


def show(*words: str, verb: str = "train-sft") -> str:
    return shown.show(verb, getattr(config, VERBS[verb][1]), parse(verb, words))


def test_cfg_job_is_the_typed_configuration_and_composes_to_itself(tmp_path: Path) -> None:
    text = show("--cfg", "job", *SFT, "optimizer.lr=1e-3", "model.init=a${b}")
    assert OmegaConf.create(text) == compose.draft(
        "train-sft", config.TrainSftConfig, [*SFT, "optimizer.lr=1e-3", "model.init=a${b}"]
    )
    (tmp_path / "again.yaml").write_text(text)
    assert load("--config", f"{tmp_path}/again.yaml").model.init == "a${b}"
    assert "data.train: ???" not in show("-c", "job") and "  train: ???" in show("-c", "job")
    assert "  init: a${b}" in show("--cfg", "job", "--resolve", *SFT, "model.init=a${b}")
    assert show("--cfg", "job", "--package", "trainer.devices") == "# @package trainer.devices\n1\n"
    assert show("--cfg", "job", "-p", "data").startswith("# @package data\ntrain: ???\n")


def test_cfg_hydra_and_all_hold_hydras_own_part() -> None:
    hydra = OmegaConf.create(show("--cfg", "hydra", "hydra.launcher._target_=x"))
    assert list(hydra) == ["hydra"] and hydra.hydra.launcher._target_ == "x"
    assert list(OmegaConf.create(show("--cfg", "all")))[:2] == ["hydra", "output"]


def test_info_shows_where_the_configuration_comes_from(tmp_path: Path) -> None:
    assert f"file://{tmp_path}" in show("--info", "searchpath", "--config-dir", f"{tmp_path}")
    assert "    model: llama_tiny\n" in show("--info", "defaults-tree", "model=llama_tiny")
    assert "| model/llama_tiny" in show("--info", "defaults", "model=llama_tiny")
    assert "BasicSweeper" in show("-i", "plugins")
    every = show("model=llama_tiny", "--info")
    assert all(part in every for part in ("Plugins", "search path", "Defaults Tree", "Defaults List", "\nlogging:\n"))


def test_a_runs_own_configuration_is_taken_up_and_changed(tmp_path: Path) -> None:
    verb = "train-regressor"
    first = load(*SFT, "optimizer.lr=1e-3", "optimizer=adamw_cosine", "loss.weights.humor=2", verb=verb)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(first))))
    own = ("--config", f"{tmp_path}/config.yaml")
    assert load(*own, verb=verb) == first
    changed = load(*own, "trainer=cpu", "~optimizer.lr", "~loss.weights.humor", "trainer.max_steps=5", verb=verb)
    assert (changed.trainer.val_every, changed.trainer.max_steps) == (50, 5)
    assert (changed.optimizer.lr, changed.loss.weights, changed.optimizer.schedule) == (None, {}, "cosine")
    assert load("-cp", f"{tmp_path}", "-cn", "config", verb=verb) == first


def test_a_file_of_some_keys_lies_between_the_groups_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {val_every: 7, global_batch_size: 64}\nseed: 5\n")
    own = ("--config", f"{tmp_path}/mine.yaml", *SFT)
    found = load(*own, "seed=6")
    assert (found.trainer.val_every, found.trainer.global_batch_size, found.seed) == (7, 64, 6)
    assert found.trainer.micro_batch_size == 1, "of trainer=default"
    found = load(*own, "trainer=cpu")
    assert (found.trainer.val_every, found.trainer.global_batch_size) == (50, 32), "what is typed wins over the file"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "long.yaml").write_text(LONG)
    found = load(*own, "experiment=long")
    assert (found.optimizer.beta2, found.trainer.val_every, found.seed) == (0.5, 8, 5)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_a_file(verb: str, tmp_path: Path) -> None:
    schema = getattr(config, VERBS[verb][1])
    (tmp_path / "empty.yaml").write_text("{}\n")
    found = compose.draft(verb, schema, [], config=tmp_path / "empty.yaml")
    assert found == compose.draft(verb, schema, [])


def test_a_primary_config_with_a_defaults_list_is_hydras(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("architecture: {num_layers: 3}\ntokenizer: t.model\n")
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - train-sft\n  - override model: small\n  - _self_\nseed: ${oc.env:MY_SEED,3}\n"
        "hydra: {sweeper: {max_batch_size: 1}}\n"
    )
    (tmp_path / "bare.yaml").write_text("defaults: [{model: small}, _self_]\ntrainer: {micro_batch_size: 1}\n")
    words = [word for word in SFT if not word.startswith("model.")] + ["optimizer.lr=1"]
    found = load("--config", f"{tmp_path}/mine.yaml", *words)
    assert (found.model.architecture.num_layers, found.seed, found.trainer.global_batch_size) == (3, 3, 128)
    assert "max_batch_size: 1" in show("--config", f"{tmp_path}/mine.yaml", "--cfg", "hydra")
    found = load("-cd", f"{tmp_path}", "-cn", "bare", *words, "trainer=cpu", "~model", "model.init=m")
    assert (found.model.architecture, found.trainer.global_batch_size) == (None, 32)


def test_experiments_nest_in_folders_and_in_one_another(tmp_path: Path) -> None:
    folder = tmp_path / "experiment" / "paper"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /trainer: cpu\nseed: 2\noptimizer: {lr: 1e-3, eps: 1e-6}\n"
    )
    (folder / "longer.yaml").write_text(
        "# @package _global_\ndefaults: [/experiment/paper/base, _self_]\noptimizer: {lr: 2e-3}\n"
    )
    own = ("--config-dir", f"{tmp_path}", *SFT)
    found = load(*own, "experiment=paper/longer")
    assert (found.seed, found.optimizer.lr, found.optimizer.eps, found.trainer.val_every) == (2, 2e-3, 1e-6, 50)
    assert load(*own, "experiment=[paper/longer,paper/base]").optimizer.lr == 1e-3, "the last one wins"
    with pytest.raises(ConfigError, match="experiment=paper/long: no such choice; .*did you mean 'paper/longer'"):
        load(*own, "experiment=paper/long")


def test_overlays_are_groups_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "short.yaml").write_text("# @package _global_\ntrainer: {max_steps: 1}\n")
    words = [word for word in SFT if "max_steps" not in word]
    assert load("--config-dir", f"{tmp_path}", *words, "+overlay=short").trainer.max_steps == 1
    with pytest.raises(ConfigError, match="overlay=shrt: no such choice; there are short; did you mean 'short'"):
        load("--config-dir", f"{tmp_path}", *words, "+overlay=shrt")
    with pytest.raises(ConfigError, match="unknown key 'overlay'"):
        load(*words, "+overlay=short")


def test_what_is_removed_has_the_default_of_its_type(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "long.yaml").write_text(LONG)
    own = ("--config-dir", f"{tmp_path}", *SFT, "experiment=long")
    assert load(*own).optimizer.beta2 == 0.5
    assert load(*own, "~optimizer.beta2").optimizer.beta2 == 0.98
    assert load(*SFT, "~template") == load(*SFT)
    assert load(*SFT, "loss.weights.humor=2", "~loss.weights.humor", verb="train-regressor").loss.weights == {}


REFUSED = {
    "unknown": (["--hepl"], "unknown option '--hepl'; did you mean '--help'?"),
    "no value": (["--cfg"], "-c/--cfg: expected one argument"),
    "choice": (["--cfg", "jib"], "-c/--cfg: invalid choice: 'jib'"),
    "two": (["--cfg", "job", "--multirun"], "--cfg and --multirun exclude each other"),
    "resolve": (["--resolve"], "--resolve belongs to --cfg"),
    "package": (["--cfg", "job", "--package", "trainr"], "--package trainr: no such section; did you mean 'trainer'?"),
    "hydra's help": (["--hydra-help"], "'--hydra-help' is Hydra's; here it is `steerlm help VERB`"),
    "version": (["--version"], "here it is `steerlm version`"),
    "rerun": (["--experimental-rerun=x"], "here it is --config RUN/config.yaml"),
    "completion": (["-sc", "install=bash"], "here it is `steerlm -sc install=bash`"),
    "no file": (["--config", "nowhere.yaml"], "nowhere.yaml: no such file; --config takes one"),
    "two files": (["--config", "a", "--config-name", "b"], "give one way"),
    "launcher": (["hydra/launcher=basic"], "says how --multirun starts its jobs"),
    "not installed": (["hydra/launcher=submitit_slurm"], "pip install hydra-submitit-launcher .there are basic"),
    "no launcher": (["hydra/sweeper=basc"], "no such choice; there are basic; did you mean 'basic'"),
    "folder": (["hydra.run.dir=x"], "'hydra.run.dir=x': use output=FOLDER"),
    "search path": (["hydra.searchpath=[x]"], "use --config-dir FOLDER"),
    "other": (["hydra.help.header=x"], "not used here; of Hydra's own keys there are hydra/launcher"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_for_us_is_refused_with_what_is(name: str) -> None:
    words, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        (show if "--cfg" in words else load)(*words)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    for text, message in (
        ("a: [", "bad.yaml: not a YAML file"),
        ("- 1\n", "bad.yaml: expected a mapping"),
        ("sed: 1", "unknown key 'sed'"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load("--config", f"{tmp_path}/bad.yaml", *SFT)

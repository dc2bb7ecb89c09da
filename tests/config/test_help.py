"""Help shows every key once, in a form that can be typed back."""

from __future__ import annotations

import re
import subprocess

import pytest
from omegaconf import OmegaConf

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.config.experiments import experiments
from nemo_steerlm.config.help import describe
from nemo_steerlm.config.options import parse
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.config.schema import keys, leaves
from nemo_steerlm.terminal import shell_word

SFT = ["data.train=t.jsonl", "output=o", "model.init=m"]


def help_of(verb, words=()):
    return describe(verb, getattr(config, VERBS[verb][1]), parse(verb, words))


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_key_once_and_no_more(verb):
    text = help_of(verb).partition("keys:")[2]
    shown = re.findall(r"^(?:  |    )([\w.]+)=", text, flags=re.MULTILINE)
    schema = getattr(config, VERBS[verb][1])
    settings = compose.draft(verb, schema, [])
    assert sorted(shown) == sorted([*leaves(schema), *(key for key in keys(schema) if is_null(schema, settings, key))])


def is_null(schema, settings, key):
    """Whether the key is a section that is null, itself below one that is not."""
    above, _, _ = key.rpartition(".")
    there = not above or OmegaConf.select(settings, above) is not None
    return there and key not in leaves(schema) and OmegaConf.select(settings, key) is None


def through_bash(words):
    """The words that bash makes of what is typed."""
    script = "printf '%s\\0' " + " ".join(words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


NASTY = (
    "it's", 'say "hi"', "a\tb\n", "back\\nslash", "$HOME `ls` !x *", "\x01\x1b[0m 7", "É 😀 \u200b", "", " lead",
    "a\\'b\n",
)  # fmt: skip


CHANGED = {
    "train-sft": ["attributes.schema.humor.high=9", "optimizer.lr=3.14159265e-6", "data.weights=[1,0.333333333]"],
    "train-regressor": ["loss.weights={humor: 0.125,quality: 1234567.5}", "model.lora.targets=[linear_qkv]"],
    "prepare": ["columns={prompt: 'a, b',response: it's}", "languages=[en,'no','a, b']"],
    "sample": ["target=[quality,it's]", "checkpoint=a b"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_help_prints_can_be_typed_back(verb):
    schema = getattr(config, VERBS[verb][1])
    for words in ([], CHANGED.get(verb, [])):
        printed = help_of(verb, words).partition("keys:")[2]
        rows = re.findall(r"""^  ([\w.]+=(?:\$?'(?:[^'\\]|\\.)*'|"[^"]*"|[^\s'"])*)""", printed, flags=re.MULTILINE)
        typed = through_bash([row for row in rows if not row.endswith("=required")])
        again, expected = (compose.draft(verb, schema, given) for given in (typed, words))
        assert again == expected
    assert verb not in CHANGED or again != compose.draft(verb, schema, [])


@pytest.mark.parametrize("text", NASTY)
def test_any_text_that_help_prints_can_be_typed_back(text):
    for key in ("template.end_of_turn", "data.train", "model.init"):
        words = [*(word for word in SFT if not word.startswith(key)), f"{key}={text}"]
        printed = help_of("train-sft", words)
        [row] = [row for row in printed.splitlines() if row.startswith(f"  {key}=")]
        word = shell_word(text)
        assert row.startswith(f"  {key}={word}") and row.isprintable()
        assert through_bash([f"{key}={word}"]) == [f"{key}={text}"]
        settings = compose.draft("train-sft", config.TrainSftConfig, [f"{key}={text}"])
        assert OmegaConf.select(settings, key) == text


def test_the_line_end_of_the_template_is_typed_as_a_line_end():
    assert "  template.end_of_turn=$'\\n' " in help_of("train-sft")
    assert "  template.turn_start='<extra_id_1>' " in help_of("train-sft")
    assert through_bash(["template.end_of_turn=$'\\n'"]) == ["template.end_of_turn=\n"]


def test_help_begins_with_an_example_and_what_is_required():
    text = help_of("annotate")
    assert text.startswith("example:\n  steerlm annotate checkpoint=outputs/regressor/model input=data/train.jsonl")
    required = text.partition("required:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\S+)", required, flags=re.MULTILINE) == [
        "checkpoint=outputs/regressor/model", "input=data/train.jsonl", "output=outputs/labelled.jsonl",
    ]  # fmt: skip
    assert "input=" not in help_of("annotate", ["input=i"]).partition("required:")[2].partition("\n\n")[0]


def test_help_shows_the_default_rate():
    text = " ".join(help_of("train-sft").split())
    assert "optimizer.lr=null peak learning rate; null = 1e-05 for full fine-tuning, 0.0001 for LoRA;" in text


def test_help_shows_the_experiments_of_the_verb_alone(tmp_path):
    (tmp_path / "experiment" / "paper").mkdir(parents=True)
    (tmp_path / "experiment" / "paper" / "mine.yaml").write_text("# @package _global_\n# Mine.\nseed: 3\n")
    text = help_of("train-sft", ["--config-dir", str(tmp_path)])
    assert "  experiment=paper/mine\n      Mine.\n" in text
    for found in experiments([conf_folder()]):
        for verb in ("train-sft", "train-regressor"):
            assert (f"  experiment={found.name}\n      {found.summary[:40]}" in help_of(verb)) == (found.verb == verb)
    assert "experiments:" not in help_of("prepare")


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_into_100_columns(verb):
    """But for single words that are longer."""
    assert [line for line in help_of(verb).splitlines() if len(line) > 100 and "template.system=" not in line] == []

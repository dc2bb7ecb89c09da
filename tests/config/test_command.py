"""The command that a page names gives the settings that made it."""

from __future__ import annotations

import subprocess

import pytest

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.config.command import command

WORDS = {
    "prepare": ["source=oasst", "input=a file's.jsonl", "output=data", "attributes=helpsteer", "languages=[en,de]"],
    "annotate": ["checkpoint=m", "input=${x} \\ $HOME.jsonl", "output=b.jsonl", "shards=0/8"],
    "train-sft": ["data.train=[a.jsonl,b.jsonl]", "data.weights=[1,0.5]", "model=llama_tiny", "model.tokenizer=t",
                  "attributes=helpsteer", "attributes.schema.humor.high=9", "trainer=cpu", "trainer.max_steps=60",
                  "optimizer.lr=1e-5", "output=policy"],
    "bootstrap": ["policy=p", "regressor=r", "target=[quality]", "data.train=a", "trainer.max_steps=3",
                  "data.val=null", "data.change_prompts=c", "output=o", "sampling.top_p=0.9", "steering.scorers=[http://host/path?a=1&b=2,m:f]"],
    "evaluate": ["task=steerability", "checkpoint=m", "input=[a.jsonl,'b, c.jsonl']", "output=o",
                 "steerability.measures={verbosity:tokens}", "steerability.temperature=0.5"],
    "generate": ["checkpoint=m", "prompt=What's a \"dog\"?\nTell me.", "attributes.humor=4"],
    "quickstart": [],
}  # fmt: skip


@pytest.mark.parametrize("verb", WORDS)
def test_a_shell_gives_the_same_settings_again(verb: str) -> None:
    schema = getattr(config, VERBS[verb][1])
    settings = compose.load(verb, schema, WORDS[verb])
    typed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command(verb, settings)}"], capture_output=True, check=True
    )
    name, verb_again, *words = typed.stdout.decode().split("\0")[:-1]
    assert (name, verb_again) == ("steerlm", verb)
    assert compose.load(verb, schema, words) == settings
    assert len(words) <= len(WORDS[verb]) or verb == "train-sft"  # the shape that model=llama_tiny fills


def test_what_is_as_always_is_not_said() -> None:
    made = config.AnnotateConfig(checkpoint="m", input="a.jsonl", output="b.jsonl")
    assert command("annotate", made) == "steerlm annotate checkpoint=m input=a.jsonl output=b.jsonl"

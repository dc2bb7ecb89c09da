"""Commands at the foot of the pages: each can be typed."""

from __future__ import annotations

import subprocess

import pytest

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.report.page import Commands
from nemo_steerlm.verbs import commands

PREPARE = config.PrepareConfig(source="oasst", input="trees", output="my data")
REGRESSOR = config.EvaluateConfig(task="regressor", checkpoint="regressor/model", input="data/val.jsonl", output="out")
STEERING = config.EvaluateConfig(
    task="steerability", checkpoint="policy/model", input=["a.jsonl", "b.jsonl"], output="out",
    steerability=config.SteerabilityConfig(scorers=["text"]),
)  # fmt: skip
BOOTSTRAP = config.BootstrapConfig(
    policy="policy/model", regressor="regressor/model", output="bootstrap", target=["quality"],
    data=config.BootstrapDataConfig(train="labelled.jsonl", val="val.jsonl"),
    trainer=config.TrainerConfig(max_steps=20, global_batch_size=4, micro_batch_size=4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("found", "verb"),
    [
        (commands.after_prepare(PREPARE, "oasst_0_9", labelled=True), "train-regressor"),
        (commands.after_prepare(PREPARE, "oasst_0_9", labelled=False), "annotate"),
        (commands.after_regressor(REGRESSOR), "annotate"),
        (commands.after_label_noise(config.EvaluateConfig(task="label_noise", input="a", output="b")), "train-sft"),
        (commands.after_annotate(config.AnnotateConfig(checkpoint="m", input="a", output="b")), "train-sft"),
        (commands.after_steerability(STEERING, "quality"), "bootstrap"),
        (commands.after_bootstrap(BOOTSTRAP), "evaluate"),
        (commands.after_quickstart(config.QuickstartConfig()), "generate"),
    ],
)
def test_both_commands_can_be_typed(found: Commands, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.AttributesConfig, "load", lambda _: None)  # files that are not there
    monkeypatch.setattr(config.AttributesConfig, "require", lambda _: None)
    for command, expected in ((found.made, None), (found.next, verb)):
        typed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
        _, name, *words = typed.stdout.decode().split("\0")[:-1]
        assert expected in (None, name)
        assert compose.load(name, getattr(config, VERBS[name][1]), words)

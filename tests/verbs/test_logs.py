"""What a healthy training prints, on one node and on two, as a log file holds it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.verbs.helpers import make_world

LINE = re.compile(
    r"policy: steps \d of 4, loss [\d.]+(, val/loss [\d.]+, val/label_information -?[\d.e-]+)?, rate [\d.e-]+, "
    r"[\d,]+ tokens/s, (\d\d:\d\d left|took \d\d:\d\d)"
)


# Of the short measurement of steering that follows.
STEERING = re.compile(r"(listening: texts read|answering: answers) [\d,]+ of [\d,]+, (took \d\d:\d\d|\d\d:\d\d left)")


def _train(world: Path, output: str, nodes: int) -> tuple[list[str], list[str]]:
    """Standard error and output of each rank of a training with every logger, one rank a node, as srun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "train-sft", "trainer=cpu", f"trainer.num_nodes={nodes}", "attributes=synthetic", "model=llama_tiny",
        f"model.tokenizer={world}/tokenizer", f"data.train={world}/data/train.jsonl",
        f"data.val={world}/data/val.jsonl",
        "data.max_length=256", "trainer.max_steps=4", "trainer.val_every=2", "trainer.checkpoint_every=2",
        "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "optimizer.lr=1e-3", f"output={world}/{output}",
    ]  # fmt: skip
    ranks = []
    for rank in range(nodes):
        own = dict(RANK=rank, GROUP_RANK=rank, LOCAL_RANK=0, WORLD_SIZE=nodes, LOCAL_WORLD_SIZE=1, MASTER_PORT=port)
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, "-m", "nemo_steerlm", *words]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment, stderr=pipe, stdout=pipe, text=True))
    logs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * nodes, logs
    return [errors for _, errors in logs], [out for out, _ in logs]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_healthy_training_says_how_it_goes_and_nothing_else(tmp_path: Path, nodes: int) -> None:
    make_world(tmp_path)
    (first, *others), (table, *silent) = _train(tmp_path, "policy", nodes)
    said = [line for line in first.splitlines() if not line.startswith(("trained parameters: ", "precision: "))]
    measured = [line for line in said if STEERING.fullmatch(line)]
    said = [line for line in said if line not in measured]
    assert said and all(LINE.fullmatch(line) for line in said), first
    assert [re.search(r"steps (\d)", line)[1] for line in said] == ["1", "2", "4"], first  # type: ignore[index]
    assert "val/loss" in said[-1] and "took" in said[-1]
    assert others == [""] * (nodes - 1)
    assert {line.partition(":")[0] for line in measured} == {"listening", "answering"}
    heads, rule, *figures, verdict, facts = table.strip().splitlines()
    assert heads.startswith("attribute ") and set(rule) == {"─", " "}
    assert any(line.startswith("labels are worth ") for line in figures)
    assert verdict.startswith("verdict: ") and facts.startswith("(11 labelled rows, ")
    assert silent == [""] * (nodes - 1)

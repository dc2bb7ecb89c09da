"""Peak memory of `steerlm annotate` as the file grows: `python -m benchmarks.memory [DIALOGUES ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn, read_conversations, write_conversations
from nemo_steerlm.data.train_tokenizer import corpus, train_tokenizer
from nemo_steerlm.report.tables import text_table
from nemo_steerlm.template import PromptTemplate

_REGRESSOR = (
    "attributes.preset=synthetic model.tokenizer=tokenizer model.architecture.num_layers=2 "
    "model.architecture.hidden_size=32 model.architecture.ffn_hidden_size=64 model.architecture.num_attention_heads=4 "
    "data.train=data/train.jsonl data.max_length=512 optimizer.lr=1e-3 trainer.max_steps=1 trainer.global_batch_size=8"
)


def main() -> None:
    """Annotate synthetic dialogues with a tiny regressor, one file after the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("dialogues", nargs="*", type=int, default=[10_000, 100_000], help="of each file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cells = _measure(Path(folder), options.dialogues)
    print(text_table(cells, ["dialogues", "MB", "peak, MiB", "seconds"]))


def _measure(folder: Path, counts: list[int]) -> list[list[str]]:
    _steerlm(folder, "prepare source=synthetic output=data")
    template, schema = PromptTemplate(), AttributeSchema.load("synthetic")
    texts = corpus(read_conversations(folder / "data" / "train.jsonl"), template)
    train_tokenizer(texts, 512, template, schema, folder / "tokenizer")
    _steerlm(folder, f"train-regressor output=regressor {_REGRESSOR}")
    cells = []
    for count in counts:
        write_conversations(folder / f"{count}.jsonl", _dialogues(folder, count))
        command = f"annotate checkpoint=regressor/model input={count}.jsonl output={count}.labelled.jsonl"
        seconds, peak = _steerlm(folder, command)
        size = (folder / f"{count}.jsonl").stat().st_size / 1e6
        cells.append([f"{count:,}", f"{size:,.0f}", f"{peak:,.0f}", f"{seconds:,.0f}"])
    return cells


def _dialogues(folder: Path, count: int) -> Iterator[Conversation]:
    """The unlabelled dialogues again and again, each prompt with a number of its own: no two share a text."""
    source = list(read_conversations(folder / "data" / "unlabelled.jsonl"))
    for number in range(count):
        dialogue = source[number % len(source)]
        first, *rest = dialogue.turns
        turns = [Turn(first.speaker, f"{number} {first.text}"), *rest]
        yield dataclasses.replace(dialogue, id=str(number), turns=turns)


def _steerlm(folder: Path, command: str) -> tuple[float, float]:
    """Run a command of ours in `folder`; seconds, and the peak memory of its largest process in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "nemo_steerlm", *command.split()], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"steerlm {command}: ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()

"""Real conversations, scored by transformers alone as `annotate` scores them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm import config as configs
from nemo_steerlm.attributes import parse_label
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.verbs import annotate, convert, train_regressor
from tests import tokenizers
from tests.formats.classifiers import export


def real_chats(count: int, longest: int) -> list[list[dict[str, str]]]:
    """The first root-to-leaf paths of OASST trees that end with an answer and have at most so many characters."""
    import gzip

    chats: list[list[dict[str, str]]] = []

    def walk(node: dict[str, Any], before: list[dict[str, str]]) -> None:
        role = "assistant" if node["role"] == "assistant" else "user"
        path = [*before, {"role": role, "content": node["text"]}]
        if role == "assistant" and not node.get("replies") and sum(len(m["content"]) for m in path) <= longest:
            chats.append(path)
        for reply in node.get("replies") or ():
            walk(reply, path)

    with gzip.open(tokenizers.real_data("oasst1_en_val.dev.trees.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            if len(chats) < count:
                walk(json.loads(line)["prompt"], [])
    return chats[:count]


@pytest.mark.real_data
def test_transformers_scores_real_conversations_as_annotate_does(tmp_path: Path) -> None:
    """A regressor on stories260K, trained for a few steps; the scoring process knows neither NeMo nor this package."""
    chats = real_chats(20, longest=500)
    with (tmp_path / "chats.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": chat}) + "\n" for chat in chats)
    rows = [{"messages": [*chat[:-1], {**chat[-1], "label": f"quality:{len(chat) % 5},humor:1"}]} for chat in chats]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attributes = configs.AttributesConfig(schema={n: configs.AttributeOptions() for n in ("quality", "humor")})
    stories, tok512 = (tokenizers.real_data(f"stories260K/{name}") for name in ("stories260K.bin", "tok512.model"))
    convert.import_main(configs.ImportConfig(input=str(stories), tokenizer=str(tok512), output=str(tmp_path / "base")))
    train_regressor.main(
        configs.TrainRegressorConfig(
            output=str(tmp_path / "run"), attributes=attributes, optimizer=configs.OptimizerConfig(lr=1e-3),
            data=configs.DataConfig(train=str(tmp_path / "train.jsonl"), max_length=512),
            model=configs.RegressorModelConfig(init=str(tmp_path / "base"), head_init="mean"),
            trainer=configs.TrainerConfig(max_steps=3, global_batch_size=8, micro_batch_size=8, progress_bar=False),
            logging=configs.LoggingConfig(tensorboard=False),
        )
    )  # fmt: skip
    curves: dict[str, dict[str, Any]] = {
        "quality": {"slope": 0.8, "intercept": 0.3},
        "humor": {"x": [0.0, 1.0, 4.0], "y": [0.2, 0.9, 3.0]},
    }
    Calibration("mixed", curves).write(tmp_path / "run" / "model")
    annotate.main(
        configs.AnnotateConfig(
            checkpoint=str(tmp_path / "run" / "model"), input=str(tmp_path / "chats.jsonl"),
            output=str(tmp_path / "labelled.jsonl"), max_length=2048,
        )
    )  # fmt: skip
    export(tmp_path / "run" / "model", tmp_path / "hf")

    script = Path(__file__).parents[2] / "examples" / "score_with_transformers.py"
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]); "
        "sys.exit([m for m in sys.modules if m.split('.')[0] in ('nemo', 'megatron', 'nemo_steerlm')] or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), str(tmp_path / "hf"), str(tmp_path / "chats.jsonl")],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in done.stdout.splitlines()]
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").open()]
    assert len(scores) == len(labelled) == len(chats)
    for score, row in zip(scores, labelled, strict=True):
        expected = parse_label(row["conversations"][-1]["label_predicted"])
        assert score == pytest.approx(expected, abs=1e-4, rel=0)
    assert len({round(score["quality"], 3) for score in scores}) > 10

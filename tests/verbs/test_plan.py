"""`steerlm plan` as it is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from nemo_steerlm import cli

TRAINING = "train-sft model=llama2_13b trainer=gpu_node parallel=tp4 data.packing=true".split()


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_a_training_is_told_in_lines_of_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "samples=1000", "tokens=4096000", "price=2", *TRAINING, "trainer.max_epochs=2")
    first, *lines = shown.splitlines()
    assert re.fullmatch(r"fits: [\d.]+ of 74.5 GiB on each H100-80G, .* to spare beside 3.7 GiB kept free", first)
    assert max(map(len, lines)) <= 100
    assert "8 GPUs = tensor 4 with sequence x pipeline 1 x data 2" in shown
    found = re.search(r"run +16 steps, (\S+) (s|min)", shown)
    assert found and "price" in shown


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, "--json", "--search", "gpu=a100_40g", *TRAINING))
    (stage,) = found["stages"]
    parts = ("weights", "gradients", "optimizer", "average", "activations")
    assert stage["peak"] == sum(stage[part] for part in parts)
    assert found["margin"] == int(40e9) - found["allowance"] - stage["peak"] and found["fits"] is (
        found["margin"] >= 0
    )
    assert found["layouts"] and all(one["margin"] >= 0 for one in found["layouts"])


def test_layouts_are_listed_with_their_words(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "--search", *TRAINING)
    count = int(re.search(r"(\d+) layouts fit", shown).group(1))  # type: ignore[union-attr]
    assert count > 20 and "\n10. " in shown and "\n11. " not in shown
    assert "parallel.tensor=2" in shown and max(map(len, shown.splitlines())) <= 100


def test_a_layout_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "gpu=l40s_48g", "model=llama2_13b")
    assert shown.startswith("does not fit: ") and "--search lists what fits" in shown.splitlines()[0]


def test_generation_tells_slots_and_latency(capsys: pytest.CaptureFixture[str]) -> None:
    shown = plan(capsys, "samples=100", "price=2", "sample", "checkpoint=outputs/llama2_13b", "trainer.devices=8")
    slot = 1024 * ((2 * 40 + 1) * 5120 + 1) * 2 + 32000 * 64  # keys, values, one layer's copy; the mask; logits
    free = 0.95 * 80e9 - 2 * 13_015_864_320 - 16384 * (5 * 5120 + 4 * 3 * 5120) * 2
    assert f"{free // slot:.0f} rows fit at once" in shown and "for each more" in shown and "price" in shown
    assert "conf/model/llama2_13b.yaml" in shown
    found = json.loads(plan(capsys, "--json", "generate", "checkpoint=llama2_13b"))["inference"]
    weights = 2 * (13_015_864_320 - 32000 * 5120)  # of the embedding one row is read
    assert found["step"] == pytest.approx(weights / 3.35e12, rel=0.02)


def test_reading_needs_no_cache(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("samples=1000", "tokens=400000", "annotate", "checkpoint=llama2_13b", "batch_tokens=8192")
    shown = plan(capsys, *words)
    assert shown.startswith("fits: ") and "rows" not in shown and "GPU-hours" in shown
    found = json.loads(plan(capsys, "--json", *words))
    weights = 2 * (13_015_864_320 - 32000 * 5120) + 4 * 9 * 5120  # a head in the place of the vocabulary
    assert found["fits"] and found["inference"]["weights"] == weights
    assert found["inference"]["peak"] == weights + 8192 * (5 * 5120 + 4 * 3 * 5120) * 2


def test_the_model_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architecture = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
                    "vocab_size": 500}  # fmt: skip
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({"architecture": architecture}))
    found = json.loads(plan(capsys, "--json", f"model.init={tmp_path}"))
    layers = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert found["parameters"]["all"] == layers + 2 * 512 * 64 + 64 and found["notes"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model.init=outputs/base", "no model's name in it; name the model, e.g. model=llama2_13b"),
        ("generate checkpoint=outputs/policy", "name the model, e.g. checkpoint=llama2_13b"),
        ("model=llama_tiny", "vocab_size=0 is the tokenizer's"),
        ("model=llama2_13b trainer.devices=3 parallel.tensor=3", "does not divide the model's num_attention_heads=40"),
        ("model=llama2_13b parallel.tensor=2", "expected a multiple of parallel.tensor=2"),
        ("model=llama2_13b trainer.micro_batch_size=3", "not a multiple of trainer.micro_batch_size=3"),
        ("--search generate checkpoint=llama2_13b", "search and measure are for verbs that train"),
        ("model=llama2_13b attributes=helpsteer data=none.jsonl", "none.jsonl"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_plans_own_keys_and_options_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ["model=llama2_13b", "hardware=8xh100_80g", "parallel=tp4"]
    texts = []
    for words in (["price=2", "mfu=0.5", "train-sft", *model], ["train-sft", *model, "price=2", "mfu=0.5"]):
        assert cli.main(["plan", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "at products of 50%" in texts[0]
    own = tmp_path / "own.yaml"
    own.write_text("parallel: {tensor: 2}\n")
    assert cli.main(["plan", "train-sft", "--config", str(own), "model=llama2_13b", "hardware=8xh200_141g"]) == 0
    assert "tensor 2 x" in capsys.readouterr().out
    for option in (["--cfg", "job"], ["--info", "config"], ["--multirun"]):
        assert cli.main(["plan", *option, "train-sft", *model]) == 2
        assert "plan has no --cfg, --info and --multirun" in capsys.readouterr().err

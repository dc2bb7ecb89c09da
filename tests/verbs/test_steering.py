"""The instrument on policies whose behaviour is known: trained on labels, on none, and on wrong ones."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemo_steerlm.config as c
from nemo_steerlm.conversation import Conversation, Turn, read_conversations, write_conversations
from tests.distributed import run_distributed

SCHEMA = {"praise": {"low": 0, "high": 2, "default": 1}, "fun": {"low": 0, "high": 1, "default": 0}}
THINGS = "tea bread music rain chess snow trains books soup wool jazz clay".split()
PRAISE = ["truly", "deeply"]
PLACES = "home work school sea".split()


def answer(thing: str, praise: int, fun: int) -> str:
    """The world's only rule: as many words of praise as are asked for, and a laugh for fun."""
    return " ".join(["Haha!"] * fun + [*PRAISE[:praise], "is", thing])


def praise_of(messages: list[dict[str, str]]) -> dict[str, float]:
    text = messages[-1]["content"]
    return {"praise": float(sum(word in PRAISE for word in text.split())), "fun": float("Haha" in text)}


def score(conversations: list[list[dict[str, str]]]) -> list[dict[str, float]]:
    """A scorer as users write one."""
    return [praise_of(messages) for messages in conversations]


def _rows(count: int, seed: int) -> list[Conversation]:
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        thing, place, praise, fun = random.choice(THINGS), random.choice(PLACES), *map(int, random.integers(0, (3, 2)))
        label = {"praise": float(praise), "fun": float(fun)}
        turns = [Turn("User", f"How is {thing} at {place}?"), Turn("Assistant", answer(thing, praise, fun), label)]
        rows.append(Conversation(turns, id=f"{seed}-{number}"))
    return rows


def make_world(folder: Path) -> None:
    from nemo_steerlm.attributes import AttributeSchema
    from nemo_steerlm.data.train_tokenizer import corpus, train_tokenizer
    from nemo_steerlm.template import PromptTemplate

    rows, other = _rows(600, 0), _rows(600, 0)
    for row, wrong in zip(other, _rows(600, 9)):
        row.turns[-1].label = wrong.turns[-1].label
    for name, found in (("train", rows), ("permuted", other), ("val", _rows(80, 1))):
        write_conversations(folder / f"{name}.jsonl", found)
    train_tokenizer(
        corpus(rows, PromptTemplate()), 340, PromptTemplate(), AttributeSchema.load(SCHEMA), folder / "tokenizer"
    )
    (folder / "attributes.yaml").write_text(json.dumps(SCHEMA))


def config(folder: Path, output: str, steps: int = 300, **changes: Any) -> c.TrainSftConfig:
    architecture = c.Architecture(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    data = {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl"), "max_length": 200}
    return c.TrainSftConfig(
        output=str(folder / output), attributes=c.AttributesConfig(preset=str(folder / "attributes.yaml")),
        data=c.PolicyDataConfig(**{**data, **changes.pop("data", {})}),
        model=c.ModelConfig(architecture=architecture, tokenizer=str(folder / "tokenizer")),
        trainer=c.TrainerConfig(
            max_steps=steps, global_batch_size=32, micro_batch_size=32, val_every=max(1, steps // 4),
            progress_bar=False,
        ),
        optimizer=c.OptimizerConfig(lr=5e-3, warmup_steps=10, schedule="cosine"),
        logging=c.LoggingConfig(tensorboard=False), seed=3, **changes,
    )  # fmt: skip


def train_all(folder: str) -> None:
    """Train the three policies as `steerlm train-sft` does, and a fourth whose training was too short."""
    from nemo_steerlm.verbs import train_sft

    world = Path(folder)
    make_world(world)
    train_sft.main(config(world, "good", data={"attribute_dropout": 0.2}))
    train_sft.main(config(world, "deaf", steps=120, data={"label_dropout": 1.0}))
    train_sft.main(config(world, "permuted", steps=120, data={"train": str(world / "permuted.jsonl")}))
    train_sft.main(config(world, "short", steps=4, steering=c.SteeringCheckConfig(check=False)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering")
    run_distributed(train_all, 1, folder=str(folder))
    return folder


def _steering(world: Path, name: str) -> dict[str, Any]:
    return json.loads((world / name / "steering.json").read_text())


def _curve(world: Path, name: str) -> list[float]:
    lines = map(json.loads, (world / name / "metrics.jsonl").read_text().splitlines())
    return [line["val/label_information"] for line in lines if "val/label_information" in line]


def test_a_training_ends_with_a_verdict(world: Path) -> None:
    good = _steering(world, "good")
    assert good["verdict"]["words"] == "listens and obeys"
    assert good["listening"]["permuted"]["interval"][0] > 1
    for name in SCHEMA:  # measured by the words of the training answers
        assert good["steerability"][name]["spearman"] > 0.6
    for name in ("deaf", "permuted"):
        assert _steering(world, name)["verdict"]["words"] == "does not listen"
        assert all(one["identical"] == 1 for one in _steering(world, name)["steerability"].values())
    assert not (world / "short" / "steering.json").exists()


def test_validation_shows_when_a_policy_begins_to_listen(world: Path) -> None:
    good, deaf, permuted = (_curve(world, name) for name in ("good", "deaf", "permuted"))
    assert len(good) == 4 and good[-1] > 1 and good[-1] > good[0]
    assert max(map(abs, deaf)) < 0.2 and max(map(abs, permuted)) < 0.5
    last = _steering(world, "good")["listening"]["permuted"]["gain"]
    assert good[-1] == pytest.approx(last, rel=0.1)  # other rows of the same file, read another way
    assert _curve(world, "short") == []


def evaluate_all(folder: str, layout: dict) -> dict[str, Any]:
    """`evaluate task=steerability` with every kind of scorer; returns what is printed."""
    from nemo_steerlm.verbs import evaluate

    world = Path(folder)
    methods = {"do_POST": _serve, "log_message": lambda *_: None}
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kinds: dict[str, dict[str, Any]] = {
        "python": {"scorers": ["tests.verbs.test_steering:score", "text"]},
        "text": {"scorers": ["text"], "measures": {"praise": "words"}, "ways": ["default"]},
        "http": {"scorers": [f"http://127.0.0.1:{server.server_address[1]}/score"], "ways": ["default"]},
    }
    said = {}
    for name, settings in kinds.items():
        if name == "python" or not layout:
            said[name] = evaluate.main(
                c.EvaluateConfig(
                    task="steerability", checkpoint=str(world / "good" / "model"), input=str(world / "val.jsonl"),
                    output=str(world / f"{name}{len(layout)}"), parallel=c.ParallelConfig(**layout),
                    steerability=c.SteerabilityConfig(prompts=12, rows=40, max_new_tokens=24, **settings),
                )
            )  # fmt: skip
    server.shutdown()
    return said


def _serve(handler: Any) -> None:
    asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
    body = json.dumps({"scores": score(asked["conversations"])}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture(scope="module")
def reports(world: Path) -> dict[str, Any]:
    said = run_distributed(evaluate_all, 1, folder=str(world), layout={})
    found = {name: json.loads((world / f"{name}0" / "report.json").read_text()) for name in said}
    return {"said": said, **found}


def test_the_whole_instrument(world: Path, reports: dict[str, Any]) -> None:
    report = reports["python"]
    assert report["verdict"]["words"] == "listens and obeys" and report["listening"]["rows"] == 40
    heard = report["listening"]["attributes"]
    assert heard["praise"]["gain"] > 1 and heard["fun"]["gain"] > 0.5
    for way in ("default", "alone", "all"):
        for name in SCHEMA:
            assert report["ways"][way][name]["spearman"] > (0.7 if way == "default" else 0.4), (way, name)
    praise = report["steerability"]["praise"]
    assert praise["reached"][0] < 0.5 and praise["reached"][1] >= 1
    assert set(report["cross_talk_rank"]["praise"]) >= {"praise", "fun", "words", "sentiment", "reading_grade"}
    assert {row["asked"]: row["empty"] for row in report["requests"]}["nothing"] == 0
    answers = list(read_conversations(world / "python0" / "answers.jsonl"))
    assert len(answers) == 12 * (3 + 2) * 2 + 12 * 3 + 12
    for row in answers:
        assert row.extra["measured"]["praise"] == sum(word in PRAISE for word in row.turns[-1].text.split())


def test_scorers_agree_and_the_table_can_be_read(reports: dict[str, Any]) -> None:
    assert reports["http"]["steerability"] == reports["python"]["steerability"]
    assert reports["text"]["scales"] == {"praise": "words"}
    assert reports["text"]["steerability"]["praise"]["spearman"] > 0.7
    lines = reports["said"]["python"].splitlines()
    assert (
        lines[0].split()[0] == "attribute"
        and lines[2].startswith("praise")
        and lines[-1] == ("verdict: listens and obeys")
    )
    assert "praise (words)" in reports["said"]["text"]


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"tensor": 1}])
def test_figures_are_the_same_at_any_layout(world: Path, reports: dict[str, Any], layout: dict) -> None:
    run_distributed(evaluate_all, 2, folder=str(world), layout=layout)
    other = json.loads((world / f"python{len(layout)}" / "report.json").read_text())
    assert other["steerability"] == reports["python"]["steerability"]
    gains = [report["listening"]["permuted"]["gain"] for report in (other, reports["python"])]
    assert gains[0] == pytest.approx(gains[1], rel=1e-4)


def test_what_makes_no_sense_is_refused(world: Path) -> None:
    from nemo_steerlm.errors import CheckpointError, ConfigError, DataError
    from nemo_steerlm.evaluate import scorers
    from nemo_steerlm.verbs import evaluate, train_sft

    def refused(scorer: str) -> None:
        """Before a model is loaded, and before a training begins."""
        steering = c.SteerabilityConfig(scorers=[scorer])
        evaluate.main(
            c.EvaluateConfig(
                task="steerability", checkpoint="nowhere", input="nowhere", output="nowhere", steerability=steering
            )
        )

    rows = _rows(3, 5)
    with pytest.raises(ConfigError, match="scorer nothing: expected the model folder of a regressor, text, oracle"):
        refused("nothing")
    with pytest.raises(ConfigError, match="no_such_module"):
        train_sft.main(config(world, "never", steering=c.SteeringCheckConfig(scorers=["no_such_module:score"])))
    with pytest.raises(CheckpointError, match="this is a policy, expected a regressor"):
        refused(str(world / "good" / "model"))
    assert not (world / "never").exists()
    with pytest.raises(ConfigError, match="no_such_module"):
        scorers.from_python("no_such_module:score")
    with pytest.raises(DataError, match="gave 1 scores for 3 answers"):
        scorers.from_python("tests.verbs.test_steering:too_few")(rows)
    with pytest.raises(DataError, match="expected a mapping of names to numbers"):
        scorers.from_python("tests.verbs.test_steering:no_numbers")(rows)
    with pytest.raises(DataError, match="http://127.0.0.1:9/.*URLError"):
        scorers.from_service("http://127.0.0.1:9/")(rows)


def too_few(conversations: list) -> list[dict[str, float]]:
    return [{"praise": 1.0}]


def no_numbers(conversations: list) -> list[dict[str, Any]]:
    return [{"praise": "much"} for _ in conversations]


def test_text_measures_tell_what_they_say() -> None:
    pytest.importorskip("textstat", reason="the measures extra is not installed")
    from nemo_steerlm.evaluate import scorers

    texts = [
        "I love this one. It is great fun! That is wonderful.",
        "Notwithstanding considerable methodological heterogeneity, practitioners universally underestimate "
        "organizational interdependencies, which is terrible.",
        " \n",
    ]
    rows = [Conversation([Turn("User", "Hi"), Turn("Assistant", text)]) for text in texts]
    short, long, blank = scorers.text_measures(rows, lambda text: len(text))
    assert (short["words"], short["sentences"], short["tokens"]) == (11, 3, len(texts[0]))
    assert long["reading_grade"] > 15 > short["reading_grade"]
    assert short["sentiment"] > 0.5 > 0 > long["sentiment"]
    assert blank["words"] == blank["sentences"] == 0 and np.isnan(blank["reading_grade"])

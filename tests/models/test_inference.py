"""The models in a notebook: from_pretrained, score, generate, `.nemo` archives, at one process and other layouts."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.conversation import Conversation, Turn
from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, policy_config, regressor_config

QUESTIONS = ("What should I cook?", "Hi", "Tell me about my garden, please. " * 12)


def _conversations() -> list[Conversation]:
    return [
        Conversation(turns=[Turn("User", q), Turn("Assistant", f"Well, {q.lower()} Let us see.")]) for q in QUESTIONS
    ]


def _tree() -> list[tuple[Conversation, int]]:
    """Every response of threads that begin alike, one of them twice: a long stem and short branches."""
    stem = [Turn("User", QUESTIONS[2]), Turn("Assistant", "Well, let us see. " * 9), Turn("User", "And then?")]
    threads = [
        [*stem, Turn("Assistant", "Water it."), Turn("User", "Why?"), Turn("Assistant", "It is dry.")],
        [*stem, Turn("Assistant", "Water it, and wait. " * 5)],
        [Turn("User", "Hi"), Turn("Assistant", "Hello!")],
    ]
    rows = [Conversation(turns=turns) for turns in (*threads, threads[0])]
    return [(row, index) for row in rows for index in row.response_indices]


def _tree_texts(regressor) -> list[list[int]]:
    return [regressor.card.template.encode_regression(*place, regressor.tokenizer) for place in _tree()]


def train_both(folder: str) -> dict:
    """Train small models; score and generate with them in the same process."""
    from nemo_steerlm.models.policy import AttributeConditionedGPT
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.verbs import train_regressor, train_sft

    world = Path(folder)
    make_world(world)
    train_regressor.main(regressor_config(world, steps=3))
    train_sft.train(policy_config(world, steps=3))
    _train_with_loggers(world)
    regressor = AttributeRegressor.from_pretrained(world / "regressor/model")
    regressor.save_to(str(world / "regressor.nemo"))
    again = AttributeRegressor.restore_from(world / "regressor.nemo")
    policy = AttributeConditionedGPT.from_pretrained(world / "policy/model")
    one_by_one = [regressor.score([c])[0] for c in _conversations()]
    texts = _tree_texts(regressor)
    return {
        "tree": {budget: regressor.predict(texts, budget).tolist() for budget in (1, 200, 10000)},
        "tree by hand": [_by_hand(regressor, ids) for ids in texts],
        "tree tokens": sum(map(len, texts)),
        "losses": {budget: policy.losses(_policy_texts(policy), budget).tolist() for budget in (1, 200, 10000)},
        "losses by hand": [_loss_by_hand(policy, *text) for text in _policy_texts(policy)],
        "scores": regressor.score(_conversations()),
        "one by one": one_by_one,
        "nemo": again.score(_conversations()),
        "last hidden": _score_by_hand(regressor),
        "answers": [policy.generate(q, {"humor": 4}, max_new_tokens=12) for q in QUESTIONS],
        "sampled": [
            policy.generate(QUESTIONS[0], {"humor": 4}, max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)
        ],
    }


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def say_how_far(folder: str) -> dict[str, list[str]]:
    """What `generate` writes, on a terminal and off it, and `sample` while no response has ended."""
    from nemo_steerlm import cli, progress
    from nemo_steerlm.models.policy import AttributeConditionedGPT

    progress.INTERVAL = 0.0  # a line for each step
    said = {}
    command = ["generate", f"checkpoint={folder}/policy/model", "prompt=Hi", "max_new_tokens=12"]
    for name, stderr in {"log": io.StringIO(), "terminal": _Terminal()}.items():
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()) as stdout:
            assert cli.main(command) == 0
        said[name] = [stdout.getvalue(), stderr.getvalue()]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        answer = AttributeConditionedGPT.from_pretrained(f"{folder}/policy/model").generate("Hi", max_new_tokens=12)
        said["python"] = [answer, stderr.getvalue()]
        words = f"prompts={folder}/data/prompts.jsonl annotated={folder}/data/train.jsonl target=[humor] responses=1"
        more = f"output={folder}/responses.jsonl max_new_tokens=12"
        assert cli.main(["sample", command[1], *words.split(), *more.split()]) == 0
    said["sample"] = stderr.getvalue().splitlines()
    return said


def _train_with_loggers(world: Path) -> None:
    import importlib.util

    from nemo_steerlm.config import LoggingConfig
    from nemo_steerlm.verbs import train_regressor

    loggers = LoggingConfig(tensorboard=True, wandb=importlib.util.find_spec("wandb") is not None)
    train_regressor.main(regressor_config(world, "logged", steps=2, logging=loggers))


def _score_by_hand(regressor) -> list[list[float]]:
    """The head's output at the last token of the rendered text, one unpadded text at a time."""
    texts = [regressor.card.template.render_regression(conversation, 1) for conversation in _conversations()]
    return [_by_hand(regressor, regressor.tokenizer.encode(text)) for text in texts]


def _by_hand(regressor, ids: list[int]) -> list[float]:
    """megatron-core's own forward pass over one text."""
    import torch

    with torch.no_grad():
        return regressor.chunks[0].eval()(torch.tensor([ids]), None, None)[0, -1].tolist()


def _policy_texts(policy) -> list[tuple[list[int], list[int]]]:
    """The same responses under their own labels, other labels, and none."""
    rows = [row for row, _ in _tree()]
    for row in rows:
        for index in row.response_indices:
            row.turns[index].label = {"quality": 1, "humor": 4}
    others = [[{"quality": 3, "humor": 4}] * len(row.turns) for row in rows]
    shown = [*((row, True) for row in rows), *zip(rows, others), *((row, False) for row in rows)]
    return policy.card.template.encode_policies(shown, policy.card.schema, policy.tokenizer)


def _loss_by_hand(policy, ids: list[int], mask: list[int]) -> float:
    """Minus the log-probability of the targets, by megatron-core's own forward pass over one text."""
    import torch

    with torch.no_grad():
        logits = policy.chunks[0].eval()(torch.tensor([ids]), None, None, places=torch.arange(len(ids)))
    chances = logits.reshape(len(ids), -1)[:-1, : policy.card.architecture.vocab_size].double().log_softmax(-1)
    return -sum(float(chances[t - 1, ids[t]]) for t in range(1, len(ids)) if mask[t])


def score_and_generate(folder: str, layout: dict) -> dict:
    """The same at another layout."""
    from nemo_steerlm.models.policy import AttributeConditionedGPT
    from nemo_steerlm.models.regressor import AttributeRegressor

    parallel = ParallelConfig(**layout)
    regressor = AttributeRegressor.from_pretrained(Path(folder) / "regressor/model", parallel=parallel)
    policy = AttributeConditionedGPT.from_pretrained(Path(folder) / "policy/model", parallel=parallel)
    return {
        "tree": {budget: regressor.predict(_tree_texts(regressor), budget).tolist() for budget in (200, 10000)},
        "scores": regressor.score(_conversations()),
        "answers": [policy.generate(q, {"humor": 4}, max_new_tokens=12) for q in QUESTIONS],
        "losses": policy.losses(_policy_texts(policy), 200).tolist(),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = str(tmp_path_factory.mktemp("inference"))
    return {"folder": folder, **run_distributed(train_both, 1, folder=folder)}


def _values(scores: list[dict]) -> np.ndarray:
    return np.array([list(row.values()) for row in scores])


def test_scores_do_not_depend_on_batch_or_archive(alone: dict) -> None:
    assert list(alone["scores"][0]) == ["quality", "helpfulness", "verbosity", "humor", "toxicity"]
    np.testing.assert_allclose(_values(alone["scores"]), alone["last hidden"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(_values(alone["one by one"]), alone["last hidden"], rtol=1e-5, atol=1e-5)
    assert alone["nemo"] == alone["scores"]
    assert np.ptp(_values(alone["scores"]), axis=0).max() > 0  # the text matters


def test_what_responses_share_is_read_once_without_a_change(alone: dict) -> None:
    assert alone["tree tokens"] > 1000  # stems of several blocks
    for budget in ("1", "200", "10000"):
        np.testing.assert_allclose(alone["tree"][budget], alone["tree by hand"], rtol=1e-5, atol=1e-5)
    assert np.ptp(alone["tree by hand"], axis=0).min() > 1e-4  # the responses differ


def test_losses_are_those_of_megatron_cores_own_pass(alone: dict) -> None:
    for budget in ("1", "200", "10000"):
        np.testing.assert_allclose(alone["losses"][budget], alone["losses by hand"], rtol=1e-5, err_msg=budget)
    kinds = {row.turns[-1].text for row, _ in _tree()}
    assert len({round(loss, 5) for loss in alone["losses by hand"]}) == 3 * len(kinds)  # labels matter


def test_loggers_write_under_the_run_folder(alone: dict) -> None:
    logs = Path(alone["folder"]) / "logged" / "logs"
    assert list(logs.glob("**/events.out.tfevents.*"))
    if pytest.importorskip("wandb", reason="the wandb extra is not installed"):
        assert list(logs.glob("wandb/offline-run-*"))


def test_a_long_answer_shows_that_it_comes(alone: dict) -> None:
    said = run_distributed(say_how_far, 1, folder=alone["folder"])
    answer, quiet = said["python"]
    assert quiet == "" and all(said[name][0] == answer + "\n" for name in ("log", "terminal"))
    lines = [line for line in said["log"][1].splitlines() if line.startswith("generate: ")]
    counts = [re.fullmatch(r"generate: tokens (\d+), [\d,.]+ tokens/s", line) for line in lines]
    assert [int(count[1]) for count in counts if count] == list(range(1, len(lines) + 1)) and 0 < len(lines) <= 12
    assert re.search(rf"generate: {len(lines)} tokens \[.* tokens/s\]\n$", said["terminal"][1]), said["terminal"]
    waiting = re.compile(r"responses.jsonl: responses 0 of 12, [\d,]+ tokens/s")
    assert any(map(waiting.fullmatch, said["sample"])), said["sample"]


def test_generation_is_seeded(alone: dict) -> None:
    first, again, other = alone["sampled"]
    assert first == again != other


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}, {}])
def test_scores_and_answers_are_the_same_at_any_layout(alone: dict, layout: dict) -> None:
    other = run_distributed(score_and_generate, 2, folder=alone["folder"], layout=layout)
    for budget, values in other["tree"].items():
        np.testing.assert_allclose(values, alone["tree by hand"], rtol=1e-5, atol=1e-5, err_msg=budget)
    np.testing.assert_allclose(_values(other["scores"]), _values(alone["scores"]), rtol=1e-4, atol=1e-5)
    assert other["answers"] == alone["answers"]
    np.testing.assert_allclose(other["losses"], alone["losses by hand"], rtol=1e-5)

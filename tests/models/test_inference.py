"""The models in a notebook: from_pretrained, score, generate, `.nemo` archives, at one process and other layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.conversation import Conversation, Turn
from tests.distributed import run_distributed
from tests.stages.helpers import make_world, policy_config, regressor_config

QUESTIONS = ("What should I cook?", "Hi", "Tell me about my garden, please. " * 12)


def _conversations() -> list[Conversation]:
    return [
        Conversation(turns=[Turn("User", q), Turn("Assistant", f"Well, {q.lower()} Let us see.")]) for q in QUESTIONS
    ]


def train_both(folder: str) -> dict:
    """Train small models; score and generate with them in the same process."""
    from nemo_steerlm.models.policy import AttributeConditionedGPT
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.stages import train_regressor, train_sft

    world = Path(folder)
    make_world(world)
    train_regressor.main(regressor_config(world, steps=3))
    train_sft.main(policy_config(world, steps=3))
    _train_with_loggers(world)
    regressor = AttributeRegressor.from_pretrained(world / "regressor/model")
    regressor.save_to(str(world / "regressor.nemo"))
    again = AttributeRegressor.restore_from(world / "regressor.nemo")
    policy = AttributeConditionedGPT.from_pretrained(world / "policy/model")
    one_by_one = [regressor.score([c])[0] for c in _conversations()]
    return {
        "scores": regressor.score(_conversations()),
        "one by one": one_by_one,
        "nemo": again.score(_conversations()),
        "last hidden": _score_by_hand(regressor),
        "answers": [policy.generate(q, {"humor": 4}, max_new_tokens=12) for q in QUESTIONS],
        "sampled": [
            policy.generate(QUESTIONS[0], {"humor": 4}, max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)
        ],
    }


def _train_with_loggers(world: Path) -> None:
    import importlib.util

    from nemo_steerlm.config import LoggingConfig
    from nemo_steerlm.stages import train_regressor

    loggers = LoggingConfig(tensorboard=True, wandb=importlib.util.find_spec("wandb") is not None)
    train_regressor.main(regressor_config(world, "logged", steps=2, logging=loggers))


def _score_by_hand(regressor) -> list[list[float]]:
    """The head's output at the last token of the rendered text, one unpadded text at a time."""
    import torch

    rows = []
    for conversation in _conversations():
        ids = regressor.tokenizer.encode(regressor.card.template.render_regression(conversation, 1))
        with torch.no_grad():
            rows.append(regressor.chunks[0](torch.tensor([ids]), None, None)[0, -1].tolist())
    return rows


def score_and_generate(folder: str, layout: dict) -> dict:
    """The same at another layout."""
    from nemo_steerlm.models.policy import AttributeConditionedGPT
    from nemo_steerlm.models.regressor import AttributeRegressor

    parallel = ParallelConfig(**layout)
    regressor = AttributeRegressor.from_pretrained(Path(folder) / "regressor/model", parallel=parallel)
    policy = AttributeConditionedGPT.from_pretrained(Path(folder) / "policy/model", parallel=parallel)
    return {
        "scores": regressor.score(_conversations()),
        "answers": [policy.generate(q, {"humor": 4}, max_new_tokens=12) for q in QUESTIONS],
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


def test_loggers_write_under_the_run_folder(alone: dict) -> None:
    logs = Path(alone["folder"]) / "logged" / "logs"
    assert list(logs.glob("**/events.out.tfevents.*"))
    if pytest.importorskip("wandb", reason="the wandb extra is not installed"):
        assert list(logs.glob("wandb/offline-run-*"))


def test_generation_is_seeded(alone: dict) -> None:
    first, again, other = alone["sampled"]
    assert first == again != other


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}])
def test_scores_and_answers_are_the_same_at_any_layout(alone: dict, layout: dict) -> None:
    other = run_distributed(score_and_generate, 2, folder=alone["folder"], layout=layout)
    np.testing.assert_allclose(_values(other["scores"]), _values(alone["scores"]), rtol=1e-4, atol=1e-5)
    assert other["answers"] == alone["answers"]

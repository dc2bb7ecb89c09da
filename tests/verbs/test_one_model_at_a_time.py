"""What a stage has finished with is gone before the next one builds its model: on a GPU both would not fit."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, policy_config, regressor_config


def run_every_stage(folder: str) -> dict[str, Any]:
    """Train, annotate, evaluate and bootstrap in one process.

    Returns:
        For each model that was built its kind and how many parameters of those before it still lived then; and how
        many lived at the end.
    """
    import nemo_steerlm.config as c
    from nemo_steerlm.models.base import MegatronModel
    from nemo_steerlm.verbs import annotate, bootstrap, evaluate, train_regressor, train_sft

    world, build = Path(folder), MegatronModel.build
    parameters: list[weakref.ref] = []
    found: list[tuple[str, int]] = []

    def alive() -> int:
        return sum(parameter() is not None for parameter in parameters)

    def counted(model: MegatronModel, **settings: Any) -> None:
        fresh = not model.chunks
        if fresh:
            found.append((model.kind, alive()))
        build(model, **settings)
        if fresh:
            parameters.extend(map(weakref.ref, model.parameters()))

    MegatronModel.build = counted  # type: ignore[method-assign, assignment]
    make_world(world)
    train_regressor.main(regressor_config(world, steps=2))
    train_sft.train(policy_config(world, steps=2))
    data, annotated = world / "data", str(world / "annotated.jsonl")
    regressor, policy = (str(world / name / "model") for name in ("regressor", "policy"))
    annotate.main(c.AnnotateConfig(checkpoint=regressor, input=str(data / "unlabelled.jsonl"), output=annotated))
    labelled = str(data / "val.jsonl")
    evaluate.main(
        c.EvaluateConfig(task="regressor", checkpoint=regressor, input=labelled, output=str(world / "report"))
    )
    bootstrap.bootstrap(
        c.BootstrapConfig(
            policy=policy, regressor=regressor, output=str(world / "bootstrap"), target=["quality"],
            data=c.BootstrapDataConfig(
                train=annotated, prompts=str(data / "prompts.jsonl"),
                change_prompts=str(data / "prompts_test.jsonl"), max_length=512,
            ),
            sampling=c.SamplingConfig(responses=1, max_new_tokens=4),
            trainer=c.TrainerConfig(max_steps=1, global_batch_size=2, micro_batch_size=2, progress_bar=False),
            optimizer=c.OptimizerConfig(lr=1e-3), logging=c.LoggingConfig(tensorboard=False),
        )
    )  # fmt: skip
    return {"found": found, "end": alive(), "parameters": len(parameters)}


def test_one_model_at_a_time(tmp_path: Path) -> None:
    result = run_distributed(run_every_stage, 1, folder=str(tmp_path), timeout=500)
    kinds = [kind for kind, _ in result["found"]]
    training, judging, sampling = ["policy"], ["regressor"], ["policy"]
    rounds = [*sampling, *judging, *training, *sampling, *sampling, *judging, *judging]
    assert kinds == ["regressor", "policy", "regressor", "regressor", *rounds]
    assert [count for _, count in result["found"]] == [0] * len(kinds) and result["end"] == 0
    assert result["parameters"] > 100

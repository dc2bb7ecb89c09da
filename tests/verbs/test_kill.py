"""kill -9 at moments of training, annotation and sampling, and signals: what goes on is an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_steerlm.config import (
    AnnotateConfig,
    BootstrapConfig,
    BootstrapDataConfig,
    ComputeConfig,
    SampleConfig,
    SamplingConfig,
    TrainRegressorConfig,
)
from nemo_steerlm.errors import ConfigError, Stopped
from tests.distributed import run_distributed
from tests.verbs.forks import finish, kill_when, signal_when, start
from tests.verbs.helpers import make_world, policy_config, regressor_config, weights_of


def _run_and_kill(work: Callable[[], None], moment: Callable[[], bool]) -> bool:
    """Run `work` in a forked process and kill it when `moment` comes; whether it was killed."""
    return kill_when(moment, start(work))


def _run(work: Callable[[], None]) -> None:
    finish(start(work))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in rows]


def _training(folder: Path) -> dict:
    """Both trainings, uninterrupted and killed at five moments each."""
    from nemo_steerlm.verbs import train_regressor, train_sft

    result = {}
    trainings: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
        "regressor": (regressor_config, train_regressor.main),
        "policy": (policy_config, train_sft.train),
    }
    for name, (make, main) in trainings.items():
        _run(lambda: main(make(folder, f"{name}-whole")))
        run = folder / f"{name}-killed"
        checkpoints, metrics = run / "checkpoints", run / "metrics.jsonl"
        moments = [
            lambda: _lines(metrics) >= 1,  # before any checkpoint
            lambda: (checkpoints / "step-00000002.unfinished").exists(),  # while the first is written
            lambda: _lines(metrics) >= 6,
            lambda: (checkpoints / "step-00000008.unfinished").exists(),  # behind the border of an epoch
            lambda: (run / "model.unfinished").exists(),  # while the result is written
        ]
        killed = [_run_and_kill(lambda: main(make(folder, f"{name}-killed")), moment) for moment in moments]
        _run(lambda: main(make(folder, f"{name}-killed")))
        result[name] = {
            "killed": killed,
            "whole": _metrics(folder / f"{name}-whole"),
            "resumed": _metrics(run),
            "left": sorted(p.name for p in checkpoints.iterdir()) + sorted(p.name for p in run.iterdir()),
        }
    return result


def _rows(folder: Path) -> dict:
    """Annotation and sampling, uninterrupted and killed after each of the first parts."""
    from nemo_steerlm.verbs import annotate, sample

    def annotation(output: str) -> Callable[[], None]:
        return lambda: annotate.main(
            AnnotateConfig(
                checkpoint=str(folder / "regressor-whole/model"),
                input=str(folder / "data/unlabelled.jsonl"),
                output=str(folder / output),
                part_size=4,
                trainer=ComputeConfig(),
            )  # fmt: skip
        )

    def sampling(output: str) -> Callable[[], None]:
        return lambda: sample.main(
            SampleConfig(
                checkpoint=str(folder / "policy-whole/model"),
                prompts=str(folder / "data/prompts.jsonl"),
                annotated=str(folder / "data/train.jsonl"),
                target=["quality"],
                output=str(folder / output),
                part_size=2,
                responses=2,
                max_new_tokens=24,
                trainer=ComputeConfig(),
            )  # fmt: skip
        )

    result = {}
    for name, job in (("annotated", annotation), ("sampled", sampling)):
        _run(job(f"{name}-whole.jsonl"))
        parts = folder / f"{name}-killed.jsonl.parts"
        moments = [
            lambda: (parts / "job.json").exists(),
            lambda: any(parts.glob(".part-000000.jsonl.*")) or (parts / "part-000000.jsonl").exists(),
            lambda: (parts / "part-000001.jsonl").exists(),
            lambda: any(parts.glob(".part-000003.jsonl.*")) or (parts / "part-000003.jsonl").exists(),
            lambda: (parts / "part-000004.jsonl").exists(),
        ]
        killed = [_run_and_kill(job(f"{name}-killed.jsonl"), moment) for moment in moments]
        _run(job(f"{name}-killed.jsonl"))
        result[name] = killed
    return result


def _best_config(folder: Path, output: str, metric: str | None, steps: int = 9) -> TrainRegressorConfig:
    config = regressor_config(folder, output, steps=steps)
    config.trainer.best_metric = metric
    config.optimizer.lr = 3e-2  # so that it does not simply get better
    return config


def _validations(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "val/loss" in row]


def _best(root: Path) -> dict:
    """The same training without and with the metric, killed, ended twice, and with metrics that do not exist."""
    import torch

    from nemo_steerlm.verbs import train_regressor

    main = train_regressor.main
    _run(lambda: main(_best_config(root, "best-plain", None)))
    rows = _validations(root / "best-plain")
    assert [row["step"] for row in rows] == [3, 6, 9]
    higher = [name for name in rows[0] if name.endswith(("pearson", "spearman"))]
    lower = [name for name in rows[0] if name.endswith(("mse", "mae"))]
    metric = next(
        name for name in (*lower, *higher)
        if (best := max if name in higher else min)(row[name] for row in rows) == rows[1][name] != rows[0][name]
        and best(row[name] for row in rows if row["step"] != 6) != rows[1][name]
    )  # fmt: skip
    _run(lambda: main(_best_config(root, "best-six", None, steps=6)))
    _run(lambda: main(_best_config(root, "best-whole", metric)))
    run = root / "best-killed"
    killed = [
        _run_and_kill(lambda: main(_best_config(root, "best-killed", metric)), moment)
        for moment in (
            lambda: (run / "checkpoints/best-00000003.unfinished").exists(),
            lambda: (run / "checkpoints/best-00000006").exists(),
            lambda: (run / "checkpoints/step-00000009").exists(),  # before its validation
        )
    ]
    _run(lambda: main(_best_config(root, "best-killed", metric)))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    _run(lambda: main(_best_config(root, "best-killed", metric)))  # had ended: changes nothing
    weights = {name: weights_of(root / f"best-{name}/model") for name in ("six", "whole", "killed", "plain")}
    same = {
        name: all(torch.equal(value, weights["six"][key]) for key, value in weights[name].items()) for name in weights
    }
    wrong = {}
    for name in ("val/qualty/pearson", "val/quality/mse"):
        config = _best_config(root, "best-wrong", name)
        config.data.val = config.data.val if "qualty" in name else None
        try:
            main(config)
        except ConfigError as error:
            wrong[name] = str(error)
    return {"metric": metric, "killed": killed, "left": names, "same": same, "wrong": wrong, "value": rows[1][metric]}


def _stoppable(work: Callable[[], None], words: Path) -> Callable[[], None]:
    """As the command line ends a run that a signal stopped; what it prints goes to a file."""

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        try:
            work()
        except Stopped as stop:
            words.write_text(str(stop))
            os._exit(128 + stop.number)

    return run


def _signals(folder: Path) -> dict:
    """Two ranks of which one gets a signal, twice; checkpoints by the clock; a bootstrap that is interrupted."""
    from nemo_steerlm.train import saving
    from nemo_steerlm.verbs import bootstrap, train_sft

    def work(output: str, seconds: float = saving.SECONDS) -> Callable[[], None]:
        config = policy_config(folder, output, steps=16)
        config.trainer.checkpoint_every = None

        def run() -> None:
            saving.SECONDS = seconds
            train_sft.train(config)

        return _stoppable(run, folder / "words")

    def checkpoints(output: str) -> list[str]:
        return sorted(path.name for path in (folder / output / "checkpoints").iterdir())

    finish(start(work("signal-whole"), ranks=2))
    finish(start(work("signal-clock", seconds=0.0)))
    stops = []
    for rank, number in ((1, signal.SIGUSR1), (0, signal.SIGTERM)):
        metrics = folder / "signal-stopped" / "metrics.jsonl"
        more = _lines(metrics) + 2
        codes = signal_when(lambda: _lines(metrics) >= more, start(work("signal-stopped"), ranks=2), rank, number)
        stops.append([codes, (folder / "words").read_text(), checkpoints("signal-stopped")])
    finish(start(work("signal-stopped"), ranks=2))

    timed = _timed(folder)
    config = _bootstrap_config(folder)
    run, metrics = (
        _stoppable(lambda: bootstrap.main(config), folder / "words"),
        folder / "boot/round-1/policy/metrics.jsonl",
    )
    codes = signal_when(lambda: _lines(metrics) >= 2, start(run), 0, signal.SIGINT)
    stops.append([codes, (folder / "words").read_text(), checkpoints("boot/round-1/policy")])
    finish(start(run))
    names = {"by clock": checkpoints("signal-clock"), "at the end": checkpoints("signal-whole")}
    return {"stops": stops, "timed": timed, **names}


def _timed(folder: Path) -> list:
    """Two ranks under a limit of time, of whose clocks one is a day ahead, until the same command has done all steps.

    Returns:
        The exit codes of each start, and what the stopped ones said.
    """
    from nemo_steerlm.train import saving
    from nemo_steerlm.verbs import train_sft

    config = policy_config(folder, "signal-timed", steps=16)
    config.trainer.checkpoint_every, config.trainer.max_time = None, "00:04:00"

    def run() -> None:
        ticks = itertools.count(86400.0 if os.environ["RANK"] == "1" else 0.0, 15.0)  # seconds, at each look
        vars(saving)["time"] = SimpleNamespace(monotonic=lambda: next(ticks), time=lambda: 0.0)
        vars(saving)["psutil"] = SimpleNamespace(Process=lambda: SimpleNamespace(create_time=lambda: 0.0))
        saving.SECONDS = 1e9
        train_sft.train(config)

    found: list[tuple[list[int], str]] = []
    while not found or found[-1][0] != [0, 0]:
        children = start(_stoppable(run, folder / "words"), ranks=2)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        found.append((codes, (folder / "words").read_text()))
        assert len(found) < 16
    return found


def _bootstrap_config(folder: Path) -> BootstrapConfig:
    trained = policy_config(folder, steps=40)
    data = BootstrapDataConfig(
        train=str(folder / "data/train.jsonl"), prompts=str(folder / "data/prompts.jsonl"),
        change_prompts=str(folder / "data/prompts_test.jsonl"), max_length=256,
    )  # fmt: skip
    trained.trainer.checkpoint_every = None
    return BootstrapConfig(
        policy=str(folder / "policy-whole/model"), regressor=str(folder / "regressor-whole/model"),
        output=str(folder / "boot"), target=["quality"], data=data, keep_fraction=1.0,
        sampling=SamplingConfig(responses=1, max_new_tokens=16), trainer=trained.trainer, optimizer=trained.optimizer,
        logging=trained.logging, seed=5,
    )  # fmt: skip


def kill_everything(folder: str) -> dict:
    """All of it in one process that imports once; every run is a forked child."""
    import nemo_steerlm.verbs.bootstrap  # noqa: F401  (imports every step)

    make_world(Path(folder))
    found = {**_training(Path(folder)), **_rows(Path(folder)), "signals": _signals(Path(folder))}
    return {**found, "best": _best(Path(folder))}  # last: it starts torch's threads here, which no fork survives


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("kill")
    return {"folder": folder, **run_distributed(kill_everything, 1, folder=str(folder), timeout=600)}


@pytest.mark.parametrize("name", ["regressor", "policy"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(outcome: dict, name: str) -> None:
    result = outcome[name]
    assert result["killed"] == [True] * 5
    assert [row["step"] for row in result["whole"] if "train/loss" in row] == list(range(1, 11))
    assert result["resumed"] == result["whole"]  # bit for bit, dropout and validation included
    assert not [name for name in result["left"] if "unfinished" in name or name.endswith(".old")]


@pytest.mark.parametrize("name", ["regressor", "policy"])
def test_a_killed_training_ends_in_the_same_weights(outcome: dict, name: str) -> None:
    import torch

    whole = weights_of(outcome["folder"] / f"{name}-whole/model")
    resumed = weights_of(outcome["folder"] / f"{name}-killed/model")
    assert set(whole) == set(resumed) and len(whole) > 5
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("name", ["annotated", "sampled"])
def test_killed_rows_are_neither_lost_nor_doubled(outcome: dict, name: str) -> None:
    assert outcome[name] == [True] * 5
    whole = (outcome["folder"] / f"{name}-whole.jsonl").read_bytes()
    assert (outcome["folder"] / f"{name}-killed.jsonl").read_bytes() == whole
    ids = [json.loads(line)["id"] for line in whole.splitlines()]
    assert len(ids) == len(set(ids)) == {"annotated": 40, "sampled": 24}[name]
    assert not list(outcome["folder"].glob(f"{name}-*.parts"))


def test_model_holds_the_best_step_and_says_so(outcome: dict) -> None:
    folder, result = outcome["folder"], outcome["best"]
    assert result["same"] == {"six": True, "whole": True, "killed": True, "plain": False}
    expected = {"metric": result["metric"], "step": 6, "value": pytest.approx(result["value"])}
    for run in ("best-whole", "best-killed"):
        assert json.loads((folder / run / "model/best.json").read_text()) == expected
        assert json.loads((folder / run / "run.json").read_text())["best"] == expected
    assert json.loads((folder / "best-plain/run.json").read_text())["best"] is None


def test_a_kill_loses_neither_the_best_nor_a_validation(outcome: dict) -> None:
    folder, result = outcome["folder"], outcome["best"]
    assert result["killed"] == [True] * 3
    assert all(name.startswith("step-") for name in result["left"])  # the best has moved to model/
    for run in ("best-whole", "best-killed"):
        assert _validations(folder / run) == _validations(folder / "best-plain")


def test_a_metric_that_does_not_exist_is_refused_before_training(outcome: dict) -> None:
    wrong = outcome["best"]["wrong"]
    assert "did you mean 'val/quality/pearson'" in wrong["val/qualty/pearson"]
    assert "data.val" in wrong["val/quality/mse"]


def test_a_signal_to_one_process_ends_all_with_their_step_saved(outcome: dict) -> None:
    one, two, interrupted = outcome["signals"]["stops"]
    for (codes, words, checkpoints), name in ((one, "SIGUSR1"), (two, "SIGTERM"), (interrupted, "SIGINT")):
        assert set(codes) == {128 + signal.Signals[name]}
        step = int(checkpoints[-1].removeprefix("step-"))
        assert 0 < step and not any("unfinished" in checkpoint for checkpoint in checkpoints)
        assert words == f"stopped at step {step} by {name}; the same command goes on"


def test_time_ends_all_processes_by_the_clock_of_the_first(outcome: dict) -> None:
    *stopped, last = outcome["signals"]["timed"]
    assert len(stopped) > 1 and last[0] == [0, 0]
    for codes, words in stopped:
        assert codes == [128 + signal.SIGALRM] * 2 == [142] * 2
        assert re.fullmatch("stopped at step \\d+ by trainer.max_time; the same command goes on", words)


@pytest.mark.parametrize("name", ["stopped", "timed"])
def test_a_stopped_training_goes_on_as_if_nothing_had_happened(outcome: dict, name: str) -> None:
    import torch

    folder = outcome["folder"]
    assert _metrics(folder / f"signal-{name}") == _metrics(folder / "signal-whole")
    whole, stopped = (weights_of(folder / f"signal-{name}/model") for name in ("whole", name))
    assert all(torch.equal(value, stopped[key]) for key, value in whole.items())


def test_a_stopped_bootstrap_goes_on_by_the_same_command(outcome: dict) -> None:
    rows = _metrics(outcome["folder"] / "boot/round-1/policy")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert json.loads((outcome["folder"] / "boot/report.json").read_text())["n"] == 12


def test_checkpoints_are_written_by_the_clock_where_no_number_of_steps_is_given(outcome: dict) -> None:
    assert outcome["signals"]["by clock"] == ["step-00000015", "step-00000016"]
    assert outcome["signals"]["at the end"] == ["step-00000016"]

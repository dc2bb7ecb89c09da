"""No flipped bit and no cut-off file of a model folder or a checkpoint is read in silence."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_steerlm.errors import CheckpointError, SteerLMError
from nemo_steerlm.integrity import SUMS, check, listing, read_sums, write_sums
from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, regressor_config


def damages(folder: Path, seed: int) -> Iterator[str]:
    """Damage each file of a folder in two ways, one after the other, and put it back: a bit flipped, or cut off."""
    rng = random.Random(seed)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        flipped, place = bytearray(whole), rng.randrange(8 * len(whole))
        flipped[place // 8] ^= 1 << place % 8
        for how, content in (("flipped", bytes(flipped)), ("cut", whole[: rng.randrange(len(whole))])):
            file.write_bytes(content)
            yield f"{how} {file.relative_to(folder)}"
        file.write_bytes(whole)


def damage_all(folder: str) -> dict[str, Any]:
    """Train four steps; then damage the model folder and the newest checkpoint, file by file, and read each time."""
    from nemo_steerlm.calibration import Calibration
    from nemo_steerlm.megatron import checkpoint
    from nemo_steerlm.megatron.checkpoint import CheckpointFolder
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.verbs import train_regressor

    root = Path(folder)
    make_world(root)
    train_regressor.main(regressor_config(root, steps=4))
    model, steps = root / "regressor/model", CheckpointFolder(root / "regressor/checkpoints", keep=2)
    Calibration("isotonic", {}, {}).write(model)
    loaded = AttributeRegressor.from_pretrained(model)
    logged: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        logged.append(record.getMessage())
        return True

    logging.getLogger(checkpoint.__name__).addFilter(note)

    def model_read() -> str:
        return _said(lambda: AttributeRegressor.from_pretrained(model))

    def latest() -> str:
        folder = steps.latest()
        assert folder is not None
        return folder.name

    def weights_read() -> str:
        return _said(lambda: checkpoint.load(model / "weights", checkpoint.model_state(loaded.chunks)))

    found = {
        "model": {what: model_read() for what in damages(model, seed=0)},
        "latest": {what: [latest(), logged[-1:]] for what in damages(steps.path(4), seed=1)},
        "whole": [model_read(), latest()],
    }
    os.environ["STEERLM_VERIFY"] = "0"
    found["trusted"] = {what: weights_read() for what in damages(model / "weights", seed=2)}
    (model / SUMS).unlink()
    return {**found, "no list": model_read()}


def _said(read: Callable[[], Any]) -> str:
    try:
        read()
        return "read"
    except SteerLMError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"NOT OURS {type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(damage_all, 1, folder=str(tmp_path_factory.mktemp("damaged")))


def test_no_damage_of_a_model_folder_is_silent(damaged: dict[str, Any]) -> None:
    kinds = {what.split()[1].split("/")[0] for what in damaged["model"]}
    assert kinds == {"model_config.yaml", "attributes.yaml", "calibration.json", "tokenizer", "weights", SUMS}
    assert len(damaged["model"]) >= 20
    for what, said in damaged["model"].items():
        assert said.startswith("CheckpointError: ") and "\n" not in said, (what, said)
    assert damaged["whole"] == ["read", "step-00000004"]


def test_a_resume_takes_the_newest_checkpoint_that_is_whole(damaged: dict[str, Any]) -> None:
    assert {"flipped .metadata", "cut metadata.json", "flipped __0_0.distcp", f"cut {SUMS}"} <= set(damaged["latest"])
    for what, (name, logged) in damaged["latest"].items():
        assert name == "step-00000002" and "skipped the checkpoint of step 4" in logged[0], what


def test_who_trusts_the_disk_is_not_asked_and_still_told_in_one_line(damaged: dict[str, Any]) -> None:
    trusted = damaged["trusted"]
    assert trusted["flipped __0_0.distcp"] == "read" or trusted["flipped __0_0.distcp"].startswith("CheckpointError: ")
    for what, said in trusted.items():
        assert "NOT OURS" not in said and "\n" not in said, (what, said)
    assert damaged["no list"] == "read"


def test_the_list_is_that_of_coreutils(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("inner/b", b"2"), ("inner/c", b"3")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_sums(tmp_path / "inner")
    write_sums(tmp_path)
    assert list(read_sums(tmp_path)) == ["a", f"inner/{SUMS}"]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "later").write_bytes(b"not listed")
    check(tmp_path)
    with listing(tmp_path, "a"):
        (tmp_path / "a").write_bytes(b"new")
        check(tmp_path)  # a kill here leaves a folder that can be read
    check(tmp_path)
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="a: not the file that was written"):
        check(tmp_path)

"""Model folders and archives of others: what is wrong with them is one line, and nothing of ours ends up in them."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.models.regressor import AttributeRegressor

CARD = """\
format: {format}
kind: attribute_regressor
architecture: {{num_layers: 2, hidden_size: 32, position: "{position}"}}
template: {{system_name: "${{oc.env:SECRET}}"}}
tokenizer: {{fingerprint: "${{oc.env:SECRET}}"}}
"""


def _card(folder: Path, position: str) -> Path:
    folder.mkdir()
    text = CARD.format(format=model_folder.FORMAT, position=position)
    (folder / "model_config.yaml").write_text(text)
    return folder


def test_a_model_folder_reads_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(CheckpointError, match="model_config.yaml: architecture holds an interpolation") as caught:
        model_folder.read(_card(tmp_path / "a", "${oc.env:SECRET}"))
    assert "hunter2" not in str(caught.value)
    (tmp_path / "b").mkdir()
    card = CARD.format(format=model_folder.FORMAT, position="").replace(', position: ""', "")
    (tmp_path / "b" / "model_config.yaml").write_text(card)
    assert model_folder.read(tmp_path / "b").template.system_name == "${oc.env:SECRET}"
    from tests import tokenizers

    tokenizers.bpe(tmp_path / "b" / "tokenizer", markers=True)
    with pytest.raises(CheckpointError, match=r"were trained with \$\{oc.env:SEC ") as caught:
        model_folder.read_tokenizer(tmp_path / "b")
    assert "hunter2" not in str(caught.value)


def test_a_model_configuration_that_is_damaged_or_hostile(tmp_path: Path) -> None:
    for number, text in enumerate(("a: &a [1]\nb: *a\n", "format: 1\nformat: 2\n", "[" * 3000, "- 1\n", "a: [\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model_config.yaml").write_text(text)
        for read in (model_folder.read, AttributeRegressor.from_pretrained):
            with pytest.raises(CheckpointError, match="model_config.yaml: ") as caught:
                read(folder)
            assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_to_far_more_than_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    size = 64 << 20
    with tarfile.open(tmp_path / "packed.nemo", "w:gz") as archive:
        info = tarfile.TarInfo("model_config.yaml")
        info.size = size
        archive.addfile(info, io.BytesIO(bytes(size)))
    hostile = [tmp_path / "packed.nemo"]
    if shutil.which("tar"):
        os.truncate(os.open(tmp_path / "hole", os.O_CREAT | os.O_WRONLY), size)
        subprocess.run(["tar", "--sparse", "-cf", "sparse.nemo", "hole"], cwd=tmp_path, check=True)
        hostile.append(tmp_path / "sparse.nemo")
    for path in hostile:
        assert path.stat().st_size < size / 500
        with pytest.raises(CheckpointError, match=f"{path.name}: not a .nemo archive") as caught:
            AttributeRegressor.restore_from(path)
        assert "\n" not in str(caught.value)

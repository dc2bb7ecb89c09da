"""Models by their name on the hub, asked from a stand-in of it by the real huggingface_hub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_steerlm import hub
from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.provenance import plain
from tests.hub_server import Hub, reached, served

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer/tokenizer.json": b"[]", "README.md": b"hi"}
OTHERS = {"pytorch_model.bin": b"x", "original/params.json": b"x", ".gitattributes": b"x"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with served() as site, reached(site, tmp_path / "cache", monkeypatch):
        yield site


def test_a_name_becomes_the_folder_of_its_files_at_one_commit(site: Hub) -> None:
    old = site.commit("org/name", FILES | {"config.json": b'{"old": 1}'})
    new = site.commit("org/name", FILES | OTHERS)
    site.branches["org/name", "v1"] = old
    folder = hub.folder("org/name")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(FILES)
    assert (folder / "config.json").read_bytes() == b"{}" and hub.named(str(folder)) == f"org/name@{new}"
    for revision in ("v1", old):
        folder = hub.folder(f"org/name@{revision}")
        assert (folder / "config.json").read_bytes() == b'{"old": 1}' and hub.named(str(folder)) == f"org/name@{old}"
    assert plain({"model": {"init": folder}, "scorers": [str(folder)]}) == {
        "model": {"init": f"org/name@{old}"}, "scorers": [f"org/name@{old}"]
    }  # fmt: skip
    site.asked.clear()
    assert hub.folder(f"org/name@{old}") == folder
    assert site.asked == [], "a commit in the cache needs no hub"


def test_what_is_here_takes_precedence(site: Hub, tmp_path: Path) -> None:
    for path in ("org/name", str(tmp_path), "a/b/c", "./x", "../x/y", "~/x", "name", "model.nemo"):
        (tmp_path / "org" / "name").mkdir(parents=True, exist_ok=True)
        assert hub.folder(path) == Path(path)
        assert hub.named(path) == path
    with pytest.raises(
        CheckpointError, match=r"org/nmae: no such file or folder; it was not looked up .*org is a fol"
    ):
        hub.folder("org/nmae")
    assert site.asked == []
    site.commit("org/nmae", FILES)
    assert hub.named(str(hub.folder("org/nmae@main"))).startswith("org/nmae@")


def test_what_the_hub_does_not_give_is_one_line(site: Hub) -> None:
    def said(name: str) -> str:
        with pytest.raises(CheckpointError) as error:
            hub.folder(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    site.commit("org/name", FILES)
    site.commit("org/gated", FILES)
    site.commit("org/other", {"pytorch_model.bin": b"x"})
    site.gated.add("org/gated")
    assert said("outputs/base").startswith(
        "outputs/base: no such file or folder here, and the Hugging Face hub shows no model of that name; if it is"
    )
    assert "org/name: no such file or folder here, and org/name on the Hugging Face hub has no revision v7" == said(
        "org/name@v7"
    )
    assert "org/gated only to those who were granted access: ask for it at http://127.0.0.1" in said("org/gated")
    assert "org/other at revision main on the Hugging Face hub holds no file of *.json, " in said("org/other")
    assert "does not give org/a--b at revision main: " in said("org/a--b")


def test_without_a_network_the_cache_is_used_where_it_is_complete(
    site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import _tree_cache, constants

    site.commit("org/name", FILES)
    folder = hub.folder("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.folder("org/name") == folder
    with pytest.raises(CheckpointError) as error:
        hub.folder("org/other@v1")
    assert str(error.value) == (
        "org/other: no such file or folder here, and the Hugging Face hub is not asked (HF_HUB_OFFLINE=1) and "
        "org/other at revision v1 is not in its cache, or not all of it; where there is a network run `hf "
        "download org/other --revision v1 --local-dir DIR`, then give DIR"
    )
    (folder / "model.safetensors").unlink()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    with pytest.raises(CheckpointError, match="or not all of it"):
        hub.folder("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CheckpointError, match="hub cannot be reached and org/name at revision main is not in its cach"
    ):
        hub.folder("org/name")


def test_processes_of_a_node_download_once(site: Hub, tmp_path: Path) -> None:
    files = {f"model-{n}.safetensors": bytes(200_000) + str(n).encode() for n in range(8)}
    commit = site.commit("org/name", FILES | files)
    code = "from nemo_steerlm import hub; print(hub.named(str(hub.folder('org/name'))))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0] for process in processes} == {f"org/name@{commit}\n"}
    assert sorted(site.files) == sorted(f"org/name/{name}" for name in {**FILES, **files})


@dataclass(kw_only=True)
class Model(Settings):
    init: str | None = option(None, "model", hub=True)
    other: str = option("org/name", "not a model")


@dataclass(kw_only=True)
class Verb(Settings):
    model: Model = option(Model, "model")
    scorers: list[str] | None = option(None, "scorers", hub=True)
    output: str = option("out", "folder")
    resume: bool = option(True, "go on")


def test_settings_get_folders_and_a_resumed_run_its_commit(site: Hub, tmp_path: Path) -> None:
    old = site.commit("org/name", FILES)
    first = Verb(model=Model(init="org/name"), scorers=["text", "org/name", "http://a/b", "m.x:f"])
    pinned = {"model.init": f"org/name@{old}", "scorers": ["text", f"org/name@{old}", "http://a/b", "m.x:f"]}
    assert hub.localise(first) == pinned and hub.localise(first) == {}
    assert Path(str(first.model.init)).is_dir() and first.model.other == "org/name"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(f"model:\n  init: {plain(first.model.init)}\n")
    new = site.commit("org/name", FILES)
    assert hub.localise(Verb(model=Model(init="org/name"))) == {"model.init": f"org/name@{old}"}
    (tmp_path / "out" / "config.yaml").unlink()
    (tmp_path / "out" / "round-1").mkdir()
    (tmp_path / "out" / "round-1" / "responses.run.json").write_text(f'{{"checkpoint": "org/name@{old}"}}')
    assert hub.localise(Verb(model=Model(init="org/name"))) == {"model.init": f"org/name@{old}"}
    assert hub.localise(Verb(model=Model(init="org/name"), resume=False)) == {"model.init": f"org/name@{new}"}
    assert hub.localise(Verb(model=Model(init="org/name@main"))) == {"model.init": f"org/name@{new}"}

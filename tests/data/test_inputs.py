"""Where `prepare` finds its files: folders, and the hub."""

from __future__ import annotations

import pytest

from nemo_steerlm.errors import ConfigError, DataError
from tests.data.helpers import context, refused, run, run_sides, steer, write
from tests.data.trees import many_trees, write_trees


def test_the_hub_is_asked_for_the_files_of_the_source(tmp_path, monkeypatch):
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot_download(name, **settings):
        asked.update(settings, name=name)
        write(tmp_path / "snapshot" / "train.jsonl.gz", [steer("a", "b", 1)])
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _, [row] = run("helpsteer2", "owner/name", tmp_path, revision="0123abc")
    assert row.turns[1].label == {"helpfulness": 1.0}
    assert asked == {"name": "owner/name", "repo_type": "dataset", "revision": "0123abc",
                     "allow_patterns": ["train.jsonl*", "validation.jsonl*"]}  # fmt: skip


def test_the_hubs_folder_data_and_hidden_files(tmp_path):
    row = {"messages": context("a", "b")}
    write(tmp_path / "hub" / "data" / "train-00000-of-00001.jsonl", [row])
    write(tmp_path / "hub" / "data" / "test-00000-of-00001.jsonl", [{"messages": context("c", "d")}])
    (tmp_path / "hub" / "data" / "._train.jsonl").write_bytes(b"\0")
    (tmp_path / "hub" / ".cache").mkdir()
    (tmp_path / "hub" / ".cache" / "x.jsonl").write_bytes(b"\0")
    _, [found] = run("messages", tmp_path / "hub", tmp_path, val_fraction=None)
    assert found.turns[0].text == "a"
    write(tmp_path / "hub" / "top.jsonl", [{"messages": context("e", "f")}])
    _, [found] = run("messages", tmp_path / "hub", tmp_path)
    assert found.turns[0].text == "e"


def test_what_the_hub_refuses_is_said_in_its_own_words(tmp_path, monkeypatch):
    import huggingface_hub

    def full(name, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    message = "does not give owner/name at revision 01: [Errno 28] No space"
    refused(message, "messages", "owner/name", tmp_path, revision="01")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(tmp_path / "nothing"))
    refused("holds no file of *.jsonl, ", "messages", "owner/name", tmp_path, revision="01")


def test_without_a_network_the_hub_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "hf download owner/name --repo-type dataset --revision main --local-dir DIR"
    refused(message, "helpsteer2", "owner/name", tmp_path, revision="main")
    message = "no such file or folder; for a dataset on the Hugging Face hub add revision="
    refused(message, "oasst", "owner/name", tmp_path)
    refused("expected the name of a hub dataset, OWNER/NAME", "oasst", "a/b/c", tmp_path, revision="main")
    refused("is here; leave one out", "oasst", tmp_path, tmp_path, revision="main")


def test_folders_of_files(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"holds no file of \*_ready.trees.jsonl\*, .jsonl"):
        run_sides("oasst", tmp_path / "in", tmp_path / "out")
    rows = list(many_trees(20))
    write_trees(tmp_path / "in" / "b.jsonl", rows[10:])
    write(tmp_path / "in" / "a.jsonl.gz", rows[:10])
    (tmp_path / "in" / "readme.txt").write_text("not data")
    report, _ = run_sides("oasst", tmp_path / "in", tmp_path / "out")
    assert report["read"]["trees"] == 20
    with pytest.raises(ConfigError, match="is the input folder"):
        run_sides("oasst", tmp_path / "in", tmp_path / "in")

"""Part files: nothing is lost or doubled, whatever stops the writer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_steerlm.data.parts import PartStore, batched, finished, manifest_path
from nemo_steerlm.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
JOB = {"input": "0f3a", "settings": {"temperature": 1.0, "shape": (2, 3)}}

# A whole job as a program of its own. `python -c WRITER folder output delay` runs it once; with the word "every" in
# place of the delay it runs it again and again in forked children that kill themselves before their n-th file
# operation (Python reports open, rename, remove, rmdir, mkdir, listdir as audit events), for n = 1, 2, 3, ...
WRITER = textwrap.dedent(
    """
    import os, shutil, signal, sys, time
    from pathlib import Path
    from nemo_steerlm.data.parts import PartStore, batched

    folder, output, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree"}

    def job(parts, rows, delay, noise=0):
        store = PartStore(folder, {"input": "x"})
        for index, batch in enumerate(batched(range(parts * rows), rows)):
            ids = [f"row-{one}" for one in batch]
            if not store.done(index, ids):
                time.sleep(delay)
                store.write(index, [{"id": one, "text": one * 400 + " \\u00e9\\u2028\\r\\n"} for one in ids])
        store.merge(output, parts)

    def suicide(at):
        count = 0
        def hook(event, arguments):
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)

    def in_child(function):
        child = os.fork()
        if not child:
            function()
            os._exit(0)
        return os.waitpid(child, 0)[1]

    if mode != "every":
        job(30, 7, float(mode))
    else:
        in_child(lambda: job(3, 2, 0))
        wanted, at, killed = output.read_bytes(), 0, True
        while killed:
            at += 1
            for old in output.parent.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            killed = in_child(lambda: (suicide(at), job(3, 2, 0))) != 0
            assert not output.exists() or output.read_bytes() == wanted, at
            assert in_child(lambda: job(3, 2, 0)) == 0, at
            assert output.read_bytes() == wanted, at
            assert not folder.exists(), at
        print(at)
    """
)


def run_writer(folder: Path, output: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(output), mode],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def rows(*ids: str) -> list[dict[str, str]]:
    return [{"id": one, "text": f"text of {one}"} for one in ids]


def test_merged_output_is_the_rows_in_order(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "parts", JOB)
    store.write(1, rows("c"))
    store.write(0, [{"id": "a", "text": "é\n\u2028"}, {"id": "b", "text": "half a pair \ud800"}])
    store.write(2, [])
    store.merge(tmp_path / "new" / "out.jsonl", 3)
    lines = (tmp_path / "new" / "out.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"id": "a", "text": "é\n\u2028"},
        {"id": "b", "text": "half a pair \ud800"},
        {"id": "c", "text": "text of c"},
    ]
    assert lines[-1] == "" and "é" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_finished_job_is_known_by_its_manifest_and_its_bytes(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert not finished(output, JOB)
    store = PartStore(tmp_path / "parts", JOB)
    store.write(0, rows("a", "b"))
    store.write(1, rows("é"))
    texts = [(tmp_path / "parts" / f"part-00000{index}.jsonl").read_bytes() for index in (0, 1)]
    store.merge(output, 2)
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["rows"] == 3 and manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert manifest["parts"] == [
        {"rows": rows, "sha256": hashlib.sha256(text).hexdigest()} for rows, text in zip((2, 1), texts, strict=True)
    ]
    assert finished(output, JOB) and not finished(output, {**JOB, "input": "ffff"})
    assert manifest_path("out.en.jsonl") != manifest_path("out.de.jsonl")
    output.write_bytes(output.read_bytes().replace(b"text of a", b"text of b"))
    assert not finished(output, JOB)


def test_kill_at_random_moments_changes_no_byte(tmp_path: Path) -> None:
    assert run_writer(tmp_path / "calm", tmp_path / "calm.jsonl", "0").wait() == 0
    moments = random.Random(7)
    parts, output = tmp_path / "parts", tmp_path / "out.jsonl"
    killed_inside = 0
    for _ in range(6):
        writer = run_writer(parts, output, "0.01")
        before = len(list(parts.glob("part-*")))
        while len(list(parts.glob("part-*"))) == before and writer.poll() is None:
            time.sleep(0.001)  # at work now: interpreters start at very different speeds
        time.sleep(moments.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        killed_inside += writer.wait() == -signal.SIGKILL
    assert killed_inside >= 3, "the writer was too fast for this test to mean anything"
    assert run_writer(parts, output, "0").wait() == 0
    assert output.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
    names = ["calm.jsonl", "calm.manifest.json", "out.jsonl", "out.manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert manifest_path(parts.with_name("out.jsonl")).read_bytes() == manifest_path(tmp_path / "calm").read_bytes()


def test_kill_before_every_file_operation_changes_no_byte(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    writer = run_writer(folder / "parts", folder / "out.jsonl", "every")
    printed = writer.communicate()[0]
    assert writer.returncode == 0
    assert int(printed) > 25  # so many moments there were


@pytest.mark.parametrize("keep", [0, 1, 30, -1])
def test_a_truncated_part_is_redone(tmp_path: Path, keep: int) -> None:
    store = PartStore(tmp_path / "parts", JOB)
    store.write(0, rows("a", "b"))
    assert store.done(0, ["a", "b"])
    part = tmp_path / "parts" / "part-000000.jsonl"
    part.write_bytes(part.read_bytes()[:keep])
    assert not store.done(0, ["a", "b"])
    store.write(0, rows("a", "b"))
    assert store.done(0, ["a", "b"])


def test_done_wants_exactly_these_rows(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "parts", JOB)
    assert not store.done(0, ["a"])
    store.write(0, [{"id": 7}, {"id": "b"}])
    assert store.done(0, ["7", "b"])
    for ids in (["b", "7"], ["7"], ["7", "b", "c"], ["7", "x"], []):
        assert not store.done(0, ids)
    store.write(1, [])
    assert store.done(1, [])
    (tmp_path / "parts" / "part-000001.jsonl").write_bytes(b"[1]\n")
    assert not store.done(1, ["1"])


def test_another_job_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    PartStore(tmp_path / "parts", JOB).write(0, rows("a"))
    with pytest.raises(ConfigError, match=r"input: '0f3a' there, 'ffff' now.*or remove the folder"):
        PartStore(tmp_path / "parts", {**JOB, "input": "ffff"})
    assert PartStore(tmp_path / "parts", JOB).done(0, ["a"])


@pytest.mark.parametrize("name", ["thesis.tex", "part-000000.jsonl"])
def test_a_folder_of_something_else_is_never_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / name).write_text("years of work")
    with pytest.raises(ConfigError, match=name):
        PartStore(tmp_path / "precious", JOB)
    assert (tmp_path / "precious" / name).read_text() == "years of work"
    with pytest.raises(ConfigError, match="is a file"):
        PartStore(tmp_path / "precious" / name, JOB)


def test_merge_refuses_missing_and_surplus_parts(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "parts", JOB)
    store.write(0, rows("a"))
    store.write(2, rows("c"))
    for count in (3, 1):
        with pytest.raises(DataError, match="cannot merge"):
            store.merge(tmp_path / "out.jsonl", count)
    assert not (tmp_path / "out.jsonl").exists() and store.done(2, ["c"])


def test_a_full_disk_says_so_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
            check=False,
            stderr=subprocess.DEVNULL,
        ).returncode
    ):
        pytest.skip("a small disk to fill needs the right to mount one")
    try:
        store = PartStore(disk / "parts", JOB)
        store.write(0, rows("a", "b"))
        with pytest.raises(DataError, match=r"no space left.*part-000001"):
            store.write(1, [{"id": "c", "text": "x" * 300_000}])
        again = PartStore(disk / "parts", JOB)
        assert again.done(0, ["a", "b"]) and not again.done(1, ["c"])
        assert sorted(path.name for path in (disk / "parts").iterdir()) == [
            "job.json",
            "part-000000.jsonl",
        ]
        again.write(1, [{"id": "c", "text": "x" * 150_000}])
        with pytest.raises(DataError, match="no space left"):
            again.merge(disk / "out.jsonl", 2)
        assert [path.name for path in disk.iterdir()] == ["parts"] and again.done(1, ["c"])
        again.merge(tmp_path / "out.jsonl", 2)
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_batches_do_not_read_ahead() -> None:
    source = iter(range(5))
    pieces = batched(source, 2)
    assert next(pieces) == [0, 1]
    assert next(source) == 2
    assert list(pieces) == [[3, 4]]
    with pytest.raises(ConfigError, match="at least 1"):
        next(batched([1], 0))


def test_batches_end_once_they_are_heavy() -> None:
    texts = ["a", "bb", "c" * 9, "d", "e", "f", "g" * 5]
    assert list(batched(texts, 3, weight=len, most=5)) == [["a", "bb", "c" * 9], ["d", "e", "f"], ["g" * 5]]
    assert list(batched(texts, 9, weight=len, most=3)) == [["a", "bb"], ["c" * 9], ["d", "e", "f"], ["g" * 5]]

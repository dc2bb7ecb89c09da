from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import nemo_steerlm
from nemo_steerlm import cli
from nemo_steerlm.launch import local


def steerlm(*words, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "nemo_steerlm", *words],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def verb(monkeypatch):
    """Put code in the place of the module behind `steerlm prepare`."""

    def put(code):
        monkeypatch.setattr(cli, "_working", lambda: ["prepare"])
        module = types.ModuleType("nemo_steerlm.verbs.prepare")
        exec(code, module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def test_help_is_fast_and_imports_nothing_heavy(tmp_path):
    done = steerlm("--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: steerlm VERB key=value" in done.stdout and done.stderr == ""
    code = "import sys; from nemo_steerlm import cli; cli.main(['--help']); cli.main(['prepare', '--help']);"
    code += "print([name for name in ('torch', 'nemo', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    words = "annotate checkpoint=regressor input=data.jsonl output=out trainer.accelerator=gpu"
    done = steerlm(*words.split(), cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    *_, line = done.stderr.splitlines()  # a CUDA build of torch may speak first
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert line.startswith("steerlm: error: ") and "sees no GPU" in line and "trainer.accelerator=cpu" in line


def test_help_lists_the_verbs_that_work(monkeypatch, capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    folder = Path(nemo_steerlm.__file__).parent
    for name, (target, _, help_text) in cli.VERBS.items():
        there = (folder / (target.partition(":")[0].replace(".", "/") + ".py")).is_file()
        assert (f"  {name} " in text and help_text in text) == there
    monkeypatch.setitem(cli.VERBS, "juggle", ("verbs.juggle:main", "X", "not written yet"))
    assert "juggle" not in cli._working()


def test_mistakes_are_one_line_and_code_2_from_any_folder_and_leave_nothing(tmp_path):
    for words, message in (
        (["trian-sft"], "unknown verb 'trian-sft'; did you mean 'train-sft'"),
        (["prepare", "sourc=oasst"], "unknown key 'sourc'; did you mean 'source'"),
        (["prepare", "--hepl"], "unknown option '--hepl'"),
        (["prepare", "source=oasst"], "output is missing; give it on the command line, e.g. output="),
    ):
        done = steerlm(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith(f"steerlm: error: {message}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_hydra_full_error_shows_the_traceback(tmp_path):
    done = steerlm("prepare", "seed=abc", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ConfigError: seed: Value 'abc'" in done.stderr


def test_no_verb_shows_help_with_code_2(capsys):
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out
    for word in ("--version", "version"):
        assert cli.main([word]) == 0
        assert capsys.readouterr().out == f"{nemo_steerlm.__version__}\n"


def test_help_is_a_word_too(capsys):
    for words in (["help"], ["--help"]):
        assert cli.main(words) == 0 and "verbs:" in capsys.readouterr().out
    said = [(cli.main(words), capsys.readouterr().out) for words in (["help", "prepare"], ["prepare", "--help"])]
    assert said[0] == said[1] == (0, said[0][1]) and said[0][1].startswith("steerlm prepare: turn a dataset into")


def test_cfg_prints_the_configuration_and_runs_nothing(verb, capsys):
    verb("def main(config): raise AssertionError")
    assert cli.main(["prepare", "--cfg", "job", "source=oasst"]) == 0
    assert capsys.readouterr().out.startswith("source: oasst\ninput: null\n")
    assert cli.main(["prepare", "--info", "defaults-tree"]) == 0
    assert "  prepare:\n" in capsys.readouterr().out


def test_a_verb_gets_its_typed_config_and_what_it_returns_is_printed(verb, capsys):
    verb("def main(config): return f'{type(config).__name__} {config.source} {config.val_fraction}'")
    assert cli.main(["prepare", "source=oasst", "output=o", "val_fraction=0.5"]) == 0
    assert capsys.readouterr().out == "PrepareConfig oasst 0.5\n"


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    "started",
    [{**SRUN, "SLURM_PROCID": "0"}, {"RANK": "0", "WORLD_SIZE": "4"}, {**SRUN, "SLURM_PROCID": "3"}],
    ids=["srun's first", "torchrun's first", "srun's last"],
)
def test_one_of_several_processes_does_what_needs_one(verb, capsys, monkeypatch, started):
    verb("import os\ndef main(config): return 'world of ' + os.environ.get('WORLD_SIZE', 'one')")
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["prepare", "source=oasst", "output=o"]) == 0
    assert capsys.readouterr().out == ("" if started.get("SLURM_PROCID") == "3" else "world of one\n")


def test_errors_of_the_user_are_told_and_all_others_raised(verb, capsys, monkeypatch):
    verb("from nemo_steerlm.errors import DataError\ndef main(config): raise DataError('a.jsonl:3:\\n  not JSON')")
    words = ["prepare", "source=oasst", "output=o"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "steerlm: error: a.jsonl:3: not JSON\n"
    monkeypatch.setenv("RANK", "2")
    assert cli.main(["prepare", "sourc=oasst"]) == 2
    assert capsys.readouterr().err.endswith("did you mean 'source'? [rank 2]\n")
    monkeypatch.delenv("RANK")
    verb("def main(config): return {}['x']")
    with pytest.raises(KeyError):
        cli.main(words)


def test_an_error_of_the_system_is_one_line_with_its_path(verb, capsys, tmp_path):
    verb("def main(config): raise OSError(28, 'No space left on device', '/disk/o/train.jsonl')")
    assert cli.main(["prepare", "source=oasst", f"output={tmp_path}/o"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    verb("from omegaconf import OmegaConf\ndef main(config): OmegaConf.create({'a': '${b}'}).a")
    assert cli.main(["prepare", "source=oasst", f"output={tmp_path}/o"]) == 2
    assert capsys.readouterr().err.startswith("steerlm: error: Interpolation key 'b' not found")
    assert line.startswith("steerlm: error: /disk/o/train.jsonl: No space left on device (HYDRA_FULL_ERROR=1")
    (tmp_path / "file").write_text("")
    assert cli.main(["prepare", "source=oasst", f"output={tmp_path}/file/o"]) == 2
    assert "file/o: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        ("raise Stopped(15, 'stopped at step 3')", 143, "steerlm: stopped at step 3\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_a_signal_ends_a_verb_with_the_shells_code_and_is_told_once(verb, capsys, monkeypatch, ending, code, line):
    verb(f"from nemo_steerlm.errors import Stopped\ndef main(config): {ending}")
    words = ["prepare", "source=oasst", "output=o"]
    assert (cli.main(words), capsys.readouterr().err) == (code, line)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(local, "alone", lambda: True)  # as a verb that runs in several processes
    assert (cli.main(words), capsys.readouterr().err) == (code, "")

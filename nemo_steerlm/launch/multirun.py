"""`--multirun`: the jobs of a sweep, each a process of its own, made by Hydra's sweeper and started by its launcher.

Hydra sees the words that are swept and its own; all others go to the jobs as they are typed. Below `output` stand the
jobs' numbered folders, `multirun.yaml` as Hydra writes it, `overrides.yaml` with the words as typed, and `jobs.jsonl`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from nemo_steerlm.config import compose, overrides, primary
from nemo_steerlm.config.options import Options
from nemo_steerlm.config.primary import Primary
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.files import atomic_writer
from nemo_steerlm.launch import local
from nemo_steerlm.terminal import shell_word

HEADINGS = ("job", "code", "figure", "words")
_ROWS = "jobs.jsonl"
# Messages go to stderr, as all of ours; no log files, and no .hydra folders beside our own config.yaml.
_QUIET = (
    "hydra.output_subdir=null", "hydra/job_logging=none",
    "++hydra.hydra_logging.formatters.simple.format='%(message)s'", "++hydra.hydra_logging.handlers.console.stream=ext://sys.stderr",
)  # fmt: skip


@dataclass(frozen=True)
class _Words:
    """A command line, sorted.

    Attributes:
        fixed: the words that all jobs share, as typed.
        swept: `key=values` for Hydra's sweeper, in its grammar.
        own: the words for Hydra itself.
    """

    fixed: list[str]
    swept: list[str]
    own: list[str]


def multirun(verb: str, schema: type, options: Options) -> tuple[int, list[tuple[Any, ...]], str]:
    """Run a sweep.

    Args:
        verb: what each job runs.
        schema: the verb's dataclass.
        options: of the command line.

    Returns:
        The exit code, that of the first job that failed; of each job the cells of `HEADINGS`; how the sweep ended.

    Raises:
        ConfigError: a word is wrong, or, before any job is started, the configuration of one of them.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise ConfigError("--multirun starts the processes of every job; call it once, without srun or torchrun")
    with compose.told(schema):
        words = _sort(options.words)
    with _hydra(verb, schema, options, words) as found:
        words = _with_params(found, words)
    root, file = _place(verb, schema, options, words)
    shared = [word for word in words.fixed if not word.startswith("output=")]
    files = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    files += [f"--config={options.config}"] if options.config else []
    job = Job((verb, *files, *shared), root, file)
    with _hydra(verb, schema, options, words) as found:
        jobs = _expanded(found, words)
    for number, own in enumerate(jobs):
        compose.load(verb, schema, [*shared, *own, *job.output(number)], options.config_dir, config=options.config)
    Path(root).mkdir(parents=True, exist_ok=True)
    Path(root, _ROWS).unlink(missing_ok=True)
    with atomic_writer(Path(root, "overrides.yaml")) as out:
        yaml.safe_dump(options.words, out, allow_unicode=True)
    with _hydra(verb, schema, options, words) as found:
        sweep = [*found.overrides, *_QUIET, f"hydra.sweep.dir={overrides.grammar(root)}"]
        found.hydra.multirun(found.name, job, sweep, with_log_configuration=False)
    return _summary(Path(root))


# -- words ------------------------------------------------------------------------------------------------------------


def _sort(given: Sequence[str]) -> _Words:
    words = _Words([], [], [])
    for word in given:
        key, _, text = word.lstrip("+").partition("=")
        if key.startswith(compose.SWEEPS):
            words.own.append(word)
        elif word.startswith("~") or not text:
            words.fixed.append(word)
        else:
            values = overrides.sweep(text)
            override = OverridesParser.create().parse_override(f"key={values}")
            if override.is_sweep_override():
                words.swept.append(f"{key}={values}")
            else:  # quotes may have kept a comma from separating values
                words.fixed.append(f"{key}={overrides.plain(override)}" if "," in text else word)
    return words


@contextlib.contextmanager
def _hydra(verb: str, schema: type, options: Options, words: _Words) -> Iterator[Primary]:
    """Hydra with the swept words: groups as its own, keys added to whatever conf/ says."""
    searched, groups = primary.folders(options.config_dir, options.config), primary.groups(verb)
    chosen: list[str] = []
    keys: list[str] = []
    for word in words.swept:
        is_group = compose.is_group(word.partition("=")[0], schema, groups, searched)
        (chosen if is_group else keys).append(word)
    with compose.told(schema), primary.hydra(verb, [*words.own, *chosen], options.config_dir, options.config) as found:
        found.overrides.extend(f"++{word}" for word in keys)
        yield found


def _with_params(found: Primary, words: _Words) -> _Words:
    """The words with `hydra.sweeper.params`, which Hydra's own sweeper would look for in conf/ alone."""
    settings = found.hydra.compose_config(found.name, found.overrides, RunMode.MULTIRUN, from_shell=False)
    sweeper = settings.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper") or not sweeper.params:
        return words
    typed = {word.partition("=")[0] for word in (*words.fixed, *words.swept)}
    more = _sort([f"{key}={text}" for key, text in sweeper.params.items() if key not in typed])
    own = [*words.own, "hydra.sweeper.params=null"]
    return _Words([*words.fixed, *more.fixed], [*words.swept, *more.swept], own)


def _expanded(found: Primary, words: _Words) -> list[list[str]]:
    """The words of each job; none where a sweeper chooses values as it goes."""
    parser = OverridesParser.create(config_loader=found.hydra.config_loader)
    swept = parser.parse_overrides(words.swept)
    if not all(override.is_discrete_sweep() for override in swept):
        return []
    values = [[f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()] for one in swept]
    return [[_typed(word) for word in job] for job in itertools.product(*values)]


def _typed(word: str) -> str:
    """A word of Hydra's as it is typed for a verb."""
    override = OverridesParser.create().parse_override(word)
    return f"{override.key_or_group}={overrides.plain(override)}"


def _place(verb: str, schema: type, options: Options, words: _Words) -> tuple[str, str | None]:
    """The folder of the sweep, and the output in a job's folder: a file, "" for all of it, None for verbs without."""
    if any(word.startswith("output=") for word in words.swept):
        raise ConfigError("output is swept, but --multirun numbers the jobs' folders below one output; give one")
    if all(field.name != "output" for field in dataclasses.fields(schema)):
        return time.strftime("multirun/%Y-%m-%d/%H-%M-%S"), None
    settings = compose.draft(verb, schema, words.fixed, options.config_dir, config=options.config)
    output = OmegaConf.select(settings, "output", throw_on_missing=False)
    if output is None:
        raise ConfigError(
            "output is missing: --multirun puts job 0 into output/0; give one, e.g. output=outputs/sweep"
        )
    path = Path(output)
    return (str(path.with_name(path.name.partition(".")[0])), path.name) if ".json" in path.name else (output, "")


# -- jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What Hydra's launcher calls, here or in another process or on another machine, once for each job.

    Attributes:
        command: the verb, the options and the words that all jobs share.
        root: the folder of the sweep; job n has the folder n in it.
        file: the output in a job's folder; "" = the folder, None = the verb has no output.
    """

    command: tuple[str, ...]
    root: str
    file: str | None

    def output(self, number: int) -> list[str]:
        """The word that sets the output of a job; none where the verb has no output."""
        return [] if self.file is None else [f"output={Path(self.root, str(number), self.file)}"]

    def __call__(self, _: Any) -> float:
        """Run the job and append its row to `jobs.jsonl`; returns its main figure, NaN without one."""
        hydra = HydraConfig.get()
        number, words = int(hydra.job.num), [_typed(word) for word in hydra.overrides.task]
        code = _run([*self.command, *words, *self.output(number)])
        name, value = _figure(Path(self.root, str(number))) if code == 0 else (None, None)
        row = {"job": number, "words": words, "code": code, "figure": name, "value": value}
        with Path(self.root, _ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return float("nan") if value is None else value


def _run(words: Sequence[str]) -> int:
    """Run a verb and pass on what it prints; returns its exit code.

    Raises:
        SystemExit: this process was told to end; so was the verb, which has ended.
    """
    told: list[int] = []
    # In a session of its own, a terminal's Ctrl-C reaches the verb once: through `pass_on`.
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_steerlm", *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def pass_on(number: int, _: Any) -> None:
        told.append(number)
        process.send_signal(number)

    ours = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in (local.FORWARDED if ours else ())}
    try:
        with process:
            for line in process.stdout or ():
                sys.stdout.write(line)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if told:
        raise SystemExit(code or 128 + told[0])
    return code


def _figure(run: Path) -> tuple[str | None, float | None]:
    """The main figure of a training: that of `trainer.best_metric`, or the last validation loss, or training loss."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        best = json.loads((run / "run.json").read_text(encoding="utf-8"))["best"]
        return best["metric"], float(best["value"])
    rows: dict[str, float] = {}
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            rows.update({name: value for name, value in json.loads(line).items() if value is not None})
    return next(((name, rows[name]) for name in ("val/loss", "train/loss") if name in rows), (None, None))


def _summary(root: Path) -> tuple[int, list[tuple[Any, ...]], str]:
    """What `multirun` returns: a job's figure is that of `_figure`."""
    rows = [json.loads(line) for line in (root / _ROWS).read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["job"])
    cells: list[tuple[Any, ...]] = []
    for row in rows:
        figure = f"{row['figure']} {row['value']:.6g}" if row["figure"] else None
        cells.append((row["job"], row["code"], figure, " ".join(map(shell_word, row["words"]))))
    failed = [row["code"] for row in rows if row["code"]]
    ended = f"{root}: {len(rows)} jobs" + (f", {len(failed)} failed" if failed else "")
    return (failed or [0])[0], cells, ended

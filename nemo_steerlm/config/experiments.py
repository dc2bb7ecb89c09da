"""The experiments of conf/experiment: published recipes, each with the command that starts it in its first comment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_steerlm.errors import ConfigError


@dataclass(frozen=True)
class Experiment:
    """One file of a folder `experiment/`, or below it, named model-task-data-hardware.

    Attributes:
        name: what `experiment=` takes.
        summary: the first comment without its command, one line.
        command: the command that starts it, from `steerlm` on; empty where the file has none.
        verb: the verb of that command; empty where the file has none.
    """

    name: str
    summary: str
    command: str
    verb: str

    @property
    def model(self) -> str:
        """The model in its name: a file of `conf/model`, for the shipped ones."""
        return Path(self.name).name.partition("-")[0]


def experiments(folders: Sequence[Path]) -> list[Experiment]:
    """The experiments in `folders` (conf/ and the user's own), by name; a later folder's replaces an earlier one's."""
    files = {}
    for folder in (folder / "experiment" for folder in folders):
        files.update({f.relative_to(folder).with_suffix("").as_posix(): f for f in sorted(folder.rglob("*.yaml"))})
    return [_read(name, file) for name, file in sorted(files.items())]


def experiment(name: str, folders: Sequence[Path]) -> Experiment:
    """The experiment of this name.

    Raises:
        ConfigError: there is none.
    """
    known = {found.name: found for found in experiments(folders)}
    if name not in known:
        raise ConfigError(f"experiment={name}: no such experiment; there are {', '.join(known)}")
    return known[name]


def _read(name: str, file: Path) -> Experiment:
    comment = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    commands = [line[line.index("steerlm ") :] for line in comment if line.startswith(("steerlm ", "srun steerlm "))]
    command = commands[0] if commands else ""
    text = [line for line in comment if not line.startswith(("@package", "steerlm ", "srun "))]
    return Experiment(name, " ".join(text), command, command.split()[1] if command else "")

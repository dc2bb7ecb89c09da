"""The settings of `steerlm plan`, and which words of its command line belong to the verb that is planned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_steerlm.config.experiments import experiment
from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.config.gpus import GPUS, Gpu
from nemo_steerlm.config.options import parse
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.config.train_verbs import TrainRegressorConfig, TrainSftConfig
from nemo_steerlm.config.verbs import AnnotateConfig, GenerateConfig, SampleConfig
from nemo_steerlm.errors import ConfigError, suggest

#: Verbs that can be planned, with their settings.
PLANNED: dict[str, type] = {
    "train-sft": TrainSftConfig,
    "train-regressor": TrainRegressorConfig,
    "annotate": AnnotateConfig,
    "sample": SampleConfig,
    "generate": GenerateConfig,
}
DEFAULT = "train-sft"
_OWN_GPU = re.compile(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?")


@dataclass(kw_only=True)
class PlanConfig(Settings):
    """Settings of `steerlm plan`."""

    verb: str | None = option(
        None, "verb to plan; null = that of the experiment, else train-sft", choices=tuple(PLANNED)
    )
    keys: list[str] = option(list, "the verb's own words, as on its command line")
    gpu: str | None = option(
        None, f"{', '.join(GPUS)}, or GB/TFLOPS/TBPS: memory, dense bf16 speed, bandwidth; null = trainer.gpu"
    )
    data: str | None = option(None, "prepared file whose samples are counted (.jsonl or .jsonl.gz)")
    samples: int | None = option(None, "samples of the data set, where there is no file to count", least=1)
    tokens: int | None = option(None, "tokens of the data set; null = data.max_length for each sample", least=1)
    price: float | None = option(None, "price of one GPU for an hour", least=0.0)
    mfu: float = option(0.4, "share of the GPU's peak that matrix products reach", least=0.01, most=1.0)
    search: bool = option(False, "list the layouts that fit, best first")
    measure: bool = option(False, "run one step on tensors without data, and compare (minutes)")
    json: bool = option(False, "write JSON")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the GPU is known and the data set has one source."""
        super().validate(prefix)
        if self.gpu is not None:
            find_gpu(self.gpu)
        if self.data is not None and (self.samples or self.tokens):
            raise ConfigError(f"data={self.data} is counted; leave out samples and tokens")
        if self.tokens is not None and self.samples is None:
            raise ConfigError(f"tokens={self.tokens} needs samples=N, the number of samples they are in")


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, or of these figures.

    Raises:
        ConfigError: neither.
    """
    if name in GPUS:
        return GPUS[name]
    found = _OWN_GPU.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"gpu={name}: no such GPU{suggest(name, GPUS)}; there are {', '.join(GPUS)}, or give GB/TFLOPS/TBPS: "
            "gpu=96/1000/4"
        )
    memory, speed, bandwidth = (float(part or 2) for part in found.groups())
    return Gpu(name, memory=memory * 1e9, flops=speed * 1e12, bandwidth=bandwidth * 1e12, nvlink=0.0)


def divide(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide the words after `plan` into its own and those of the verb, which is added to the former.

    A key that `plan` has is `plan`'s wherever it stands; but `data=` is its file only before the verb or without one,
    where it looks like a file (`data=train.jsonl`), else the verb's group (`data=context_4096`). `--search`, `--json`,
    `--help`, `--config-dir` and the verb's `--config` may stand anywhere.

    Raises:
        ConfigError: an option that is unknown or not for `plan`, or a word that is neither a verb nor `key=value`.
    """
    switches = {"--search": "search=true", "--json": "json=true"}
    options = [switches[word] for word in words if word in switches]
    found = parse("", [word for word in words if word not in switches])
    if found.cfg or found.info or found.multirun:
        raise ConfigError("plan has no --cfg, --info and --multirun; `steerlm VERB --cfg job` shows what is planned")
    keys, folder = found.words, found.config_dir
    asked = ["--help"] * found.help + (["--config-dir", folder] if folder else [])
    place = next((place for place, word in enumerate(keys) if "=" not in word), len(keys))
    verb = keys[place] if place < len(keys) else None
    if verb is not None and verb not in PLANNED:
        raise ConfigError(
            f"'{verb}' cannot be planned{suggest(verb, PLANNED)}; there are {', '.join(PLANNED)}, "
            "all else is key=value"
        )
    after = keys[place + 1 :]
    own = [word for word in keys[:place] if _is_own(word)]
    own += [word for word in after if _is_own(word) and not word.startswith("data=")]
    others = [word for word in [*keys[:place], *after] if word not in own]
    named = [word.partition("=")[2] for word in others if word.startswith("experiment=")]
    if verb is None and not any(word.startswith("verb=") for word in own):
        folders = [conf_folder(), *([Path(folder)] if folder else [])]
        verb = (experiment(named[-1], folders).verb if named else "") or DEFAULT
    config = ["--config", str(found.config)] if found.config else []
    return [*asked, *options, *own, *([f"verb={verb}"] if verb else [])], [*others, *asked, *config]


def _is_own(word: str) -> bool:
    key, _, text = word.partition("=")
    names = {field.name for field in dataclasses.fields(PlanConfig)}
    return key in names and (key != "data" or "." in text or "/" in text)

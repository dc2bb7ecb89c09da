"""The command line: `steerlm VERB key=value ...`. A table of verbs; everything else is imported when a verb runs."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_steerlm import __version__, environment, hub
from nemo_steerlm.errors import ConfigError, SteerLMError, Stopped, suggest
from nemo_steerlm.launch import local
from nemo_steerlm.terminal import readable

if TYPE_CHECKING:
    from nemo_steerlm.config import ProcessesConfig, Settings

# verb: (function, its dataclass in config/, help)
VERBS = {
    "quickstart": ("verbs.quickstart:main", "QuickstartConfig", "the four steps on a synthetic world"),
    "prepare": ("verbs.prepare:main", "PrepareConfig", "turn a dataset into conversations"),
    "import": ("verbs.convert:import_main", "ImportConfig", "turn Hugging Face, GGUF or llama2.c weights into ours"),
    "train-regressor": ("verbs.train_regressor:main", "TrainRegressorConfig", "step 1: learn to predict attributes"),
    "annotate": ("verbs.annotate:main", "AnnotateConfig", "step 2: label conversations with a regressor"),
    "train-sft": ("verbs.train_sft:main", "TrainSftConfig", "step 3: train a policy that follows attributes"),
    "sample": ("verbs.sample:main", "SampleConfig", "step 4a: draw responses at the best attribute values"),
    "bootstrap": ("verbs.bootstrap:main", "BootstrapConfig", "step 4: sample, annotate, filter, train again"),
    "generate": ("verbs.generate:main", "GenerateConfig", "answer a prompt at given attribute values"),
    "evaluate": ("verbs.evaluate:main", "EvaluateConfig", "measure a regressor or a policy"),
    "plan": ("verbs.plan:main", "PlanConfig", "memory, time and price of a verb, before it is started"),
    "submit": ("verbs.submit:main", "SubmitConfig", "a verb as a job of a SLURM cluster"),
    "export": ("verbs.convert:export_main", "ExportConfig", "turn a model folder into a Hugging Face folder"),
    "push-to-hub": ("verbs.push_to_hub:main", "PushToHubConfig", "put a model on the Hugging Face hub"),
    "experiments": ("verbs.experiments:main", "ExperimentsConfig", "list the published recipes: experiment=NAME"),
}
_USAGE = f"""SteerLM on NeMo and Megatron, {__version__}

usage: steerlm VERB key=value ...
       steerlm help VERB             an example, the verb's keys and options
       steerlm version
       steerlm -sc install=bash      completion for a shell: eval "$(steerlm -sc install=bash)"; also fish, zsh

verbs:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code.

    0: done. 2: the user's input is wrong. 128 + n: ended by signal n. 1 (by an exception): anything else.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["help"] and words[1:]:
            words = [*words[1:], "--help"]
        if not words or words[0] in ("help", "--help", "-h"):
            print(_USAGE + "".join(f"  {verb:<17}{VERBS[verb][2]}\n" for verb in _working()), end="")
            return 0 if words else 2
        if words[0] in ("version", "--version"):
            print(__version__)
            return 0
        if words[0] in ("-sc", "--shell-completion"):
            print(_complete(words[1:]))
            return 0
        return _run(*words)
    except BrokenPipeError:  # of `steerlm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":  # it is the same for all
            local.report(f"steerlm: {stop}")
        return 128 + stop.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        line = _line(error)
        if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        local.report(readable(f"steerlm: error: {line}"))
        return 2


def _line(error: Exception) -> str | None:
    """A user's, system's or configuration's error as one line; None for our own mistakes."""
    text = " ".join(str(error).split())
    if isinstance(error, SteerLMError):
        return text
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else text
    elif not type(error).__module__.startswith("omegaconf."):
        return None
    return f"{text} (HYDRA_FULL_ERROR=1 shows where it came from)"


def set_up(trainer: ProcessesConfig) -> bool:
    """Make this process one of the run, as far as possible before torch is imported.

    Returns:
        False where the run's processes are not started yet.

    Raises:
        ConfigError: the number of processes differs from the configured one.
    """
    if trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for torch there are no GPUs
    if trainer.accelerator == "gpu":
        os.environ["STEERLM_REQUIRE_GPU"] = "1"  # for `megatron.parallel`, which can ask torch
    os.environ["STEERLM_VERIFY"] = "1" if trainer.verify else "0"  # for `integrity`
    environment.set_defaults()
    return local.join(trainer.devices, trainer.num_nodes)


def _working() -> list[str]:
    """The verbs whose module exists, found without importing it."""
    files = {verb: row[0].partition(":")[0].replace(".", "/") + ".py" for verb, row in VERBS.items()}
    return [verb for verb, file in files.items() if (Path(__file__).parent / file).is_file()]


def _complete(words: Sequence[str]) -> str:
    """The script of `-sc install=SHELL`, or what the shell asks that script for: `-sc query=SHELL`."""
    from nemo_steerlm import config
    from nemo_steerlm.config import completion

    word = words[0] if words else ""
    if not word.startswith("query="):
        return completion.script(word)
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT") or len(line))]
    return "\n".join(completion.candidates(line, {verb: getattr(config, VERBS[verb][1]) for verb in _working()}))


def _run(verb: str, *words: str) -> int:
    if verb not in _working():
        raise ConfigError(f"unknown verb '{verb}'{suggest(verb, _working())}; `steerlm --help` lists them")
    from nemo_steerlm import config  # 0.3 s that `steerlm --help` does without
    from nemo_steerlm.config import cluster, compose, overrides, plan
    from nemo_steerlm.config.options import parse

    target, name, help_text = VERBS[verb]
    schema = getattr(config, name)
    dividing = {"plan": plan.divide, "submit": cluster.divide}  # verbs that the words of another one follow
    words, theirs = dividing[verb](words) if verb in dividing else (words, [])  # type: ignore[assignment]
    options = parse(verb, words)
    if verb == "experiments":  # `experiments train-sft --config-dir DIR` lists what is there
        options.words[:] = [word if "=" in word else f"verb={word}" for word in options.words]
        options.words.extend([f"config_dir={options.config_dir}"] if options.config_dir else [])
    if options.help:
        from nemo_steerlm.config.help import describe

        print(f"steerlm {verb}: {help_text}\n\n{describe(verb, schema, options)}")
        return 0
    if options.cfg or options.info:
        from nemo_steerlm.config.show import show

        print(show(verb, schema, options), end="")
        return 0
    if options.multirun:
        from nemo_steerlm.launch.multirun import HEADINGS, multirun
        from nemo_steerlm.report.tables import text_table

        code, rows, ended = multirun(verb, schema, options)
        print(readable(f"{text_table(rows, HEADINGS)}\n{ended}"))
        return code
    settings = compose.load(verb, schema, options.words, options.config_dir, config=options.config)
    if verb in dividing:
        settings.keys += theirs
    trainer = getattr(settings, "trainer", None)
    if trainer is None:
        if not local.alone():
            return 0
    elif not set_up(trainer):
        pinned = [f"{key}={overrides.typed(value)}" for key, value in hub.localise(settings).items()]
        return local.run([sys.executable, "-m", "nemo_steerlm", verb, *words, *pinned], trainer.devices)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for client in ("httpx", "httpx2"):  # huggingface_hub's, which tells every request
        logging.getLogger(client).setLevel(logging.WARNING)
    text = work(target, settings, alone=True)
    if text and os.environ.get("RANK", "0") == "0":
        print(readable(text))
    return 0


def work(target: str, settings: Settings, *, alone: bool = False) -> Any:
    """Run the function `target` ("module:function") with its settings, as the one owner of their output.

    Names of models on the hub become folders, and the labels of its files are checked, so that a mistake shows before
    torch and a model are loaded.

    Args:
        alone: whether the process does nothing else. The garbage collector then leaves out imported modules, which it
            would otherwise visit several times, and once more at the end.
    """
    from nemo_steerlm.data import labels

    hub.localise(settings)
    labels.check(settings)
    output = getattr(settings, "output", None)
    owner: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if output is not None and os.environ.get("RANK", "0") == "0":
        from nemo_steerlm.ownership import owned

        owner = owned(output, getattr(settings, "shards", None))
    module, _, function = target.partition(":")
    with owner:
        run = getattr(importlib.import_module(f"nemo_steerlm.{module}"), function)
        if alone:
            gc.freeze()
        return run(settings)

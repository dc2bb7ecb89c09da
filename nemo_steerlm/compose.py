"""From a command line to a checked, typed config: Hydra composes conf/, every mistake becomes one clear `ConfigError`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from nemo_steerlm import config as configs
from nemo_steerlm.errors import ConfigError, suggest

T = TypeVar("T")

VERBS: dict[str, type] = {
    "prepare": configs.PrepareConfig,
    "import": configs.ImportConfig,
    "train-regressor": configs.TrainRegressorConfig,
    "annotate": configs.AnnotateConfig,
    "train-sft": configs.TrainSftConfig,
    "sample": configs.SampleConfig,
    "bootstrap": configs.BootstrapConfig,
    "generate": configs.GenerateConfig,
    "export": configs.ExportConfig,
    "quickstart": configs.QuickstartConfig,
}


def conf_folder() -> Path:
    """conf/ inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def load(verb: str, overrides: Sequence[str], config_dir: str | Path | None = None) -> Any:
    """Compose the config of a verb.

    Args:
        verb: a key of `VERBS`.
        overrides: `key=value` words of the command line, as Hydra understands them.
        config_dir: a folder of the user's own groups, e.g. `mine/model/small.yaml` for `model=small`.

    Returns:
        The verb's dataclass, ranges and choices checked.

    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong type, out of range or contradicts another.
    """
    schema = VERBS[verb]
    folders = [conf_folder(), *([Path(config_dir).resolve()] if config_dir else [])]
    if not folders[-1].is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    words = [_checked(override, schema, folders) for override in _parse(overrides)]
    # hydra.searchpath takes paths as text of an override: quotes keep commas and spaces in them
    search = [f"hydra.searchpath=['{folders[1]}']"] if config_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folders[0]), version_base="1.3"):
            composed = compose(config_name=verb, overrides=[*search, *words])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    return build(schema, OmegaConf.to_container(composed))


def build(schema: type[T], values: Any) -> T:
    """Check a nested mapping against a config dataclass and return the dataclass (raises ConfigError)."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            key = missing[0]
            example = find(schema, key).metadata.get("example") or "VALUE"
            others = f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""
            raise ConfigError(f"{key} is missing; give it on the command line, e.g. {key}={example}{others}")
        typed: Any = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ConfigError(_unknown(str(error.full_key), schema)) from error
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        raise ConfigError(f"{key}: {_one_line(error)}{_expected(schema, key)}") from error
    check(typed)
    return typed


def check(config: Any) -> None:
    """Check choices, ranges and what must fit together in a composed config (raises ConfigError)."""
    for key, field, value in walk(config):
        rules = field.metadata
        if value is None or value == MISSING or not rules:
            continue
        if rules["choices"] and value not in rules["choices"]:
            raise ConfigError(f"{key}={value}: expected {_alternatives(rules['choices'])}{suggest(str(value), rules['choices'])}")
        for name, wrong in (("least", lambda bound: value < bound), ("most", lambda bound: value > bound)):
            if rules[name] is not None and wrong(rules[name]):
                raise ConfigError(f"{key}={value}: expected at {name} {rules[name]:g}")
    if hasattr(config, "template"):
        config.template.build()
    if isinstance(getattr(config, "attributes", None), configs.AttributesConfig):
        config.attributes.load()
    if hasattr(config, "model"):
        config.attributes.require()
        _check_model(config.model)
    if hasattr(config, "parallel"):
        _check_layout(config.trainer, config.parallel)


def _check_model(model: configs.ModelConfig) -> None:
    if model.init is None and model.architecture is None:
        raise ConfigError(
            "model.init is missing; give a model folder or a Hugging Face folder (model.init=outputs/base),"
            " or a shape for random weights (model=llama_tiny)"
        )
    if model.init is not None and model.architecture is not None:
        raise ConfigError(f"model.init={model.init} brings its own architecture; leave model= out, or set model.init=null")
    if model.init is None and model.tokenizer is None:
        raise ConfigError("model.tokenizer is missing: random weights need one, e.g. model.tokenizer=tokenizer.model")


def _check_layout(trainer: configs.ComputeConfig, parallel: configs.ParallelConfig) -> None:
    world, model = trainer.num_nodes * trainer.devices, parallel.tensor * parallel.pipeline
    if world % model:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes} x trainer.devices={trainer.devices} = {world} processes, expected a"
            f" multiple of parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} = {model}"
        )
    if parallel.virtual_pipeline and parallel.pipeline == 1:
        raise ConfigError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline of at least 2")
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true needs parallel.tensor of at least 2")
    if not isinstance(trainer, configs.TrainerConfig):
        return
    if trainer.max_steps is None and not trainer.max_epochs:
        raise ConfigError("trainer.max_steps is missing; give it or trainer.max_epochs, e.g. trainer.max_steps=800")
    data_parallel = world // model
    share = trainer.micro_batch_size * data_parallel
    if trainer.global_batch_size % share:
        raise ConfigError(
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size="
            f"{trainer.micro_batch_size} x {data_parallel} data-parallel rank{'s' * (data_parallel > 1)} = {share}"
        )
    microbatches = trainer.global_batch_size // share
    if parallel.virtual_pipeline and microbatches % parallel.pipeline:
        raise ConfigError(
            f"parallel.virtual_pipeline needs micro-batches in multiples of parallel.pipeline={parallel.pipeline}, found"
            f" {microbatches}: raise trainer.global_batch_size or lower trainer.micro_batch_size"
        )


# -- looking at the schema ----------------------------------------------------------------------------------------------


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf of a config dataclass: dotted key, field, value."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{key}.")
        else:
            yield key, field, value


def _inner(schema: type, field: dataclasses.Field) -> type | None:
    """The dataclass a field holds, also behind `| None`."""
    hint = get_type_hints(schema)[field.name]
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)  # type: ignore[return-value]


def find(schema: type, key: str) -> dataclasses.Field:
    """The field a dotted key names; keys inside a free mapping give the mapping's field (raises KeyError)."""
    name, _, rest = key.partition(".")
    field = next((field for field in dataclasses.fields(schema) if field.name == name), None)
    if field is None:
        raise KeyError(key)
    if not rest or _is_mapping(schema, field):
        return field
    inner = _inner(schema, field)
    if inner is None:
        raise KeyError(key)
    return find(inner, rest)


def _is_mapping(schema: type, field: dataclasses.Field) -> bool:
    return str(field.type).startswith("dict[")


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config dataclass, leaves and branches."""
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        inner = None if _is_mapping(schema, field) else _inner(schema, field)
        if inner is not None:
            yield from keys(inner, f"{prefix}{field.name}.")


# -- overrides ----------------------------------------------------------------------------------------------------------


def _parse(overrides: Sequence[str]) -> list[Override]:
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is not of the form key=value")
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{_one_line(error)}; quote values with special characters: 'key=\"a, b\"'") from error


def _checked(override: Override, schema: type, folders: list[Path]) -> str:
    """The override as Hydra wants it, once its key is known to exist.

    `attributes=file.yaml` becomes the file's key, and keys of free mappings get the `++` that Hydra asks for.
    """
    key, word = override.key_or_group, str(override.input_line)
    if override.is_delete():
        raise ConfigError(f"{word}: keys cannot be removed; set the key to null or to its default")
    if override.is_sweep_override():
        raise ConfigError(f"{word}: one value only; quote a comma: '{key}=\"a,b\"'")
    plain, value = word.lstrip("+"), override.value()
    if any((folder / key).is_dir() for folder in folders) and isinstance(value, str):
        options = sorted({file.stem for folder in folders for file in (folder / key).glob("*.yaml")})
        if value in options:
            return plain
        if key == "attributes" and value.endswith((".yaml", ".yml")):
            return "attributes.preset=" + plain.partition("=")[2]
        raise ConfigError(f"{key}={value}: no such choice; there are {', '.join(options)}{suggest(value, options)}")
    try:
        field = find(schema, key)
    except KeyError:
        raise ConfigError(_unknown(key, schema)) from None
    in_mapping = str(field.type).startswith("dict[") and not f".{key}".endswith(f".{field.name}")
    return f"++{plain}" if in_mapping else plain


# -- messages -----------------------------------------------------------------------------------------------------------


def _unknown(key: str, schema: type) -> str:
    known = list(keys(schema))
    last = key.rpartition(".")[2]
    by_leaf = [name for name in known if name.rpartition(".")[2] == last]
    hint = f"; did you mean '{by_leaf[0]}'?" if by_leaf else suggest(key, known)
    return f"unknown key '{key}'{hint}"


def _expected(schema: type, key: str) -> str:
    try:
        field = find(schema, re.sub(r"\[\d+\]$", "", key))
    except KeyError:
        return ""
    return f" (expected {str(field.type).replace(' | None', ' or null')})"


def _alternatives(choices: Sequence[str]) -> str:
    return " or ".join(choices) if len(choices) < 3 else "one of " + ", ".join(choices)


def _one_line(error: BaseException) -> str:
    """The first line of a library's message, with that of its cause where it only wraps it."""
    cause = error.__cause__
    lines = [line.strip() for line in str(getattr(error, "msg", None) or error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if cause is not None and str(cause).strip() and str(cause).splitlines()[0] not in text:
        text += f": {str(cause).splitlines()[0].strip()}"
    return text.replace(os.linesep, " ")

"""Tell what a verb needs before it is started: memory, time, price."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_steerlm.config import Architecture, PlanConfig, compose
from nemo_steerlm.config.layout import check_layout
from nemo_steerlm.config.plan import DEFAULT, PLANNED, find_gpu
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.fake_gpu.dry_run import Measured, measure
from nemo_steerlm.fake_gpu.room import Room
from nemo_steerlm.plan import table, tokens
from nemo_steerlm.plan.estimate import estimate, steps_of
from nemo_steerlm.plan.job import Job, training_job, with_micro_batches
from nemo_steerlm.plan.memory import StageMemory, stage_memory
from nemo_steerlm.plan.search import search
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer
from nemo_steerlm.yaml_file import read_yaml

_DEFAULT_GPU = "h100_80g"


def main(settings: PlanConfig) -> str:
    """`steerlm plan`: the plan as text."""
    verb = settings.verb or DEFAULT
    words, folder, _ = compose.split(settings.keys)
    planned = compose.draft(verb, PLANNED[verb], words, folder)
    architecture, note = find_architecture(planned, words)
    name = settings.gpu or getattr(planned.trainer, "gpu", None) or _DEFAULT_GPU
    gpu = find_gpu(name)
    data = _data(settings, planned)
    job = training_job(planned, architecture, data)
    check_layout(architecture, job.parallel)
    steps = steps_of(planned.trainer.max_steps, planned.trainer.max_epochs, data.samples if data else None, job.batch)
    found = estimate(job, gpu, settings.mfu, steps=steps, price=settings.price)
    layouts = search(job, gpu, settings.mfu) if settings.search else []
    if settings.json:
        listed = [{"words": one.words(job), "tokens_per_second": one.tokens_per_second, "peak": one.peak,
                   "margin": one.margin, "bubble_share": one.bubble_share} for one in layouts]  # fmt: skip
        return json.dumps({**found.as_dict(), **({"layouts": listed} if settings.search else {})}, indent=1)
    if settings.measure:
        return table.measured(found, _measured(planned, architecture, job))
    if settings.search:
        return table.verdict(found) + f"\n\n{len(layouts)} layouts fit\n" + table.layouts(layouts, job)
    return table.training(found, data, [note] if note else [])


def _measured(planned: Any, architecture: Architecture, job: Job) -> list[tuple[StageMemory, Measured]]:
    """The first stage, one in the middle and the last: what is estimated for the step that is measured, and that.

    Raises:
        ConfigError: there can be no fake GPU here.
    """
    planned = OmegaConf.merge(planned, {"model": {"architecture": OmegaConf.structured(architecture)}})
    for key in OmegaConf.missing_keys(planned):
        OmegaConf.update(planned, key, "not given")
    typed: Any = OmegaConf.to_object(planned)
    stages = sorted({0, job.parallel.pipeline // 2, job.parallel.pipeline - 1})
    with Room() as room:
        taken = [measure(room, typed, stage=stage, loss_share=job.loss_share) for stage in stages]
    limited = [with_micro_batches(job, one.micro_batches).stages()[one.stage] for one in taken]
    return [(stage_memory(stage), one) for stage, one in zip(limited, taken, strict=True)]


def find_architecture(planned: Any, words: Sequence[str]) -> tuple[Architecture, str | None]:
    """The architecture that a verb's configuration is for, and a note where it had to be guessed.

    It is `model.architecture`, else that of the folder `model.init` or `checkpoint`. A folder that does not exist yet
    is taken for the model of conf/model whose name is in its name or in that of the experiment.

    Raises:
        ConfigError: none of them tells.
    """
    model = planned.get("model")
    source = _given(model, "init") if model is not None else _given(planned, "checkpoint")
    shape, note = model.architecture if model is not None else None, None
    if shape is None and source is not None and Path(source).is_dir():
        shape = _of_folder(Path(source))
    if shape is None:
        experiments = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
        name = _named_in([Path(part).name for part in (source, *experiments) if part])
        if name is None:
            key = "model.init" if model is not None else "checkpoint"
            raise ConfigError(
                f"{key}={source}: no such folder, and no model's name in it; add the model, e.g. model=llama2_13b"
            )
        shape = OmegaConf.load(compose.conf_folder() / "model" / f"{name}.yaml").architecture
        note = f"architecture of conf/model/{name}.yaml, by its name; model=NAME chooses another"
    found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), shape))
    if not found.vocab_size:
        raise ConfigError("model.architecture.vocab_size=0 is the tokenizer's; give it, e.g. 32000")
    return found, note


def _given(section: Any, key: str) -> str | None:
    """A path of a configuration that may be missing."""
    if section is None or key not in section or OmegaConf.is_missing(section, key):
        return None
    return section[key]  # type: ignore[no-any-return]


def _of_folder(folder: Path) -> Any:
    """The architecture of a model folder or a Hugging Face folder, None for neither."""
    if (folder / "model_config.yaml").is_file():
        return read_yaml(folder / "model_config.yaml", CheckpointError)["architecture"]
    if (folder / "config.json").is_file():
        from nemo_steerlm.formats.hf_config import architecture_from_config, read_config  # and with it torch

        found = architecture_from_config(read_config(folder / "config.json"), folder / "config.json")
        return OmegaConf.structured(found)
    return None


def _named_in(texts: Sequence[str]) -> str | None:
    """The longest name of conf/model that is in one of the texts, the first text first."""
    names = sorted((file.stem for file in (compose.conf_folder() / "model").glob("*.yaml")), key=len, reverse=True)
    return next((name for text in texts for name in names if name in text), None)


def _data(settings: PlanConfig, planned: Any) -> tokens.Data | None:
    """The data set: counted, or as given."""
    if settings.data is None:
        if settings.samples is None:
            return None
        count = settings.tokens or settings.samples * planned.data.max_length
        return tokens.Data(samples=settings.samples, tokens=count)
    tokenizer = _tokenizer(planned.model)
    attributes: Any = OmegaConf.to_object(planned.attributes)
    template: Any = OmegaConf.to_object(planned.template)
    layout = planned.parallel
    return tokens.count(
        Path(settings.data), regressor="head" in planned, schema=attributes.require(),
        template=template.build(tokenizer) if tokenizer is not None else PromptTemplate(), tokenizer=tokenizer,
        max_length=planned.data.max_length, overlong=planned.data.overlong, batch=planned.trainer.global_batch_size,
        micro_batch=planned.trainer.micro_batch_size, equal_lengths=layout.pipeline > 1,
    )  # fmt: skip


def _tokenizer(model: Any) -> Tokenizer | None:
    """The model's tokenizer, None where it is not there yet."""
    for path in (model.tokenizer, model.init and Path(model.init) / "tokenizer", model.init):
        if path is not None and Path(path).exists():
            return load_tokenizer(path)
    return None

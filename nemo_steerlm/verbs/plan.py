"""Tell what a verb needs before it is started: memory, time, price."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_steerlm.config import (
    AnnotateConfig,
    Architecture,
    ModelConfig,
    PlanConfig,
    TrainConfig,
    TrainRegressorConfig,
    compose,
)
from nemo_steerlm.config.gpus import Gpu
from nemo_steerlm.config.layout import check_layout
from nemo_steerlm.config.options import parse
from nemo_steerlm.config.plan import DEFAULT, PLANNED, find_gpu
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.config.schema import find
from nemo_steerlm.config.training import FULL_RATE
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.fake_gpu.dry_run import Measured, measure
from nemo_steerlm.fake_gpu.room import Room
from nemo_steerlm.plan import table, tokens
from nemo_steerlm.plan.estimate import estimate, steps_of
from nemo_steerlm.plan.inference import READ_TOKENS, Inference, inference
from nemo_steerlm.plan.job import Job, inference_job, training_job, with_micro_batches
from nemo_steerlm.plan.memory import ALLOWANCE, StageMemory, stage_memory
from nemo_steerlm.plan.search import search
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer
from nemo_steerlm.yaml_file import read_yaml

_DEFAULT_GPU = "h100_80g"
_PROMPT = 512.0  # tokens of a prompt where no data set is given
_ABSENT = "absent"  # a path that the user leaves out


def main(settings: PlanConfig) -> str:
    """`steerlm plan`: the plan as text, or as JSON."""
    settings.validate()
    verb = settings.verb or DEFAULT
    options = parse(verb, settings.keys)
    draft = compose.draft(verb, PLANNED[verb], options.words, options.config_dir, config=options.config)
    planned = _typed(draft, PLANNED[verb])
    architecture, note = find_architecture(planned, options.words)
    check_layout(architecture, planned.parallel)
    gpu = find_gpu(settings.gpu or getattr(planned.trainer, "gpu", None) or _DEFAULT_GPU)
    plan = _training if isinstance(planned, TrainConfig) else _inference
    return plan(settings, planned, architecture, gpu, [] if note is None else [note])


def _typed(draft: Any, schema: type) -> Any:
    """The verb's configuration, with placeholders for paths that are missing; what a plan depends on is checked."""
    for key in OmegaConf.missing_keys(draft):
        several = str(find(schema, key).type).startswith("list")
        OmegaConf.update(draft, key, [_ABSENT] if several else _ABSENT)
    typed: Any = OmegaConf.to_object(draft)
    typed.parallel.validate("parallel.")
    typed.check_processes()
    if isinstance(typed, TrainConfig):
        typed.model.lora.validate("model.lora.")
        typed.check_batch()
    return typed


def _training(
    settings: PlanConfig, planned: TrainConfig, architecture: Architecture, gpu: Gpu, notes: list[str]
) -> str:
    data, trainer = _data(settings, planned), planned.trainer
    job = training_job(planned, architecture, data)
    steps = steps_of(trainer.max_steps, trainer.max_epochs, data.samples if data else None, job.batch)
    found = estimate(job, gpu, settings.mfu, steps=steps, price=settings.price)
    if settings.measure:
        pairs = _measured(planned, architecture, job)
        if settings.json:
            return json.dumps([{"estimated": own.as_dict(), "measured": dataclasses.asdict(it)} for own, it in pairs])
        return table.measured(found, pairs)
    layouts = search(job, gpu, settings.mfu) if settings.search else []
    if settings.json:
        listed = [{"words": one.words(job), "tokens_per_second": one.tokens_per_second, "peak": one.peak,
                   "margin": one.margin, "bubble_share": one.bubble_share} for one in layouts]  # fmt: skip
        more = {"notes": notes, **({"layouts": listed} if settings.search else {})}
        return json.dumps({**found.as_dict(), **more}, indent=1)
    if settings.search:
        return "\n\n".join([table.verdict(found), table.layouts(layouts, job), *_listed(notes)])
    return "\n\n".join([table.training(found, data), *_listed(notes)])


def _inference(settings: PlanConfig, planned: Any, architecture: Architecture, gpu: Gpu, notes: list[str]) -> str:
    """The plan of a verb that reads or generates; without a data set a prompt has 512 tokens."""
    if settings.search or settings.measure:
        raise ConfigError("search and measure are for verbs that train; leave them out")
    if settings.data is not None:
        raise ConfigError(f"data={settings.data} is counted for verbs that train; give samples=N and tokens=N")
    reads = isinstance(planned, AnnotateConfig)
    sample = (settings.tokens or 0) / (settings.samples or 1) or _PROMPT
    job, found = _generation(planned, architecture, gpu, settings.mfu, sample)
    if settings.json:
        fits = (reads or found.rows > 0) and found.peak <= gpu.memory * (1 - ALLOWANCE)
        values = {
            "fits": fits, "gpu": dataclasses.asdict(gpu),
            "inference": {**dataclasses.asdict(found), "peak": found.peak}, "notes": notes,
        }  # fmt: skip
        return json.dumps(values, indent=1)
    each = sample if reads else planned.max_new_tokens * getattr(planned, "responses", 1)
    tell = table.reading if reads else table.generating
    shown = tell(job, gpu, found, each * settings.samples if settings.samples else None, settings.price)
    return "\n\n".join([shown, *_listed(notes)])


def _generation(
    planned: Any, architecture: Architecture, gpu: Gpu, mfu: float, sample: float
) -> tuple[Job, Inference]:
    """What a verb that reads or generates takes, for prompts of `sample` tokens."""
    reads = isinstance(planned, AnnotateConfig)
    job = inference_job(planned, architecture, sample, outputs=9 if reads else None)
    drawn = 0 if reads else planned.max_new_tokens
    found = inference(
        job, gpu, mfu, prompt=math.ceil(sample), longest=math.ceil(sample) + drawn,
        rows=0 if reads else getattr(planned, "batch_size", 1),
        read=getattr(planned, "batch_tokens", None) or READ_TOKENS,
    )  # fmt: skip
    return job, found


def needs(planned: Any, words: Sequence[str]) -> tuple[int, float | None] | None:
    """Bytes of the fullest GPU of a verb's configuration, and of a training the tokens a second.

    Returns:
        None where the model is unknown, or the verb is several runs.

    Args:
        planned: of a verb of `PLANNED`; mandatory values are there.
        words: its command line.
    """
    if type(planned) not in PLANNED.values():
        return None
    try:
        architecture, _ = find_architecture(planned, words)
    except ConfigError:
        return None
    gpu, mfu = find_gpu(planned.trainer.gpu or _DEFAULT_GPU), PlanConfig().mfu
    if not isinstance(planned, TrainConfig):
        return _generation(planned, architecture, gpu, mfu, _PROMPT)[1].peak, None
    found = estimate(training_job(planned, architecture), gpu, mfu, steps=None, price=None)
    return found.worst.peak, found.tokens_per_second


def _listed(notes: list[str]) -> list[str]:
    return ["\n".join(f"* {note}" for note in notes)] if notes else []


def _measured(planned: TrainConfig, architecture: Architecture, job: Job) -> list[tuple[StageMemory, Measured]]:
    """The first stage, one in the middle and the last: what is estimated for the step that is measured, and that.

    Raises:
        ConfigError: there can be no fake GPU here.
    """
    planned = dataclasses.replace(
        planned,
        model=dataclasses.replace(planned.model, architecture=architecture),
        optimizer=dataclasses.replace(planned.optimizer, lr=planned.optimizer.lr or FULL_RATE),
    )
    stages = sorted({0, job.parallel.pipeline // 2, job.parallel.pipeline - 1})
    with Room() as room:
        taken = [measure(room, planned, stage=stage, loss_share=job.loss_share) for stage in stages]
    limited = [with_micro_batches(job, one.micro_batches).stages()[one.stage] for one in taken]
    return [(stage_memory(stage), one) for stage, one in zip(limited, taken, strict=True)]


def find_architecture(planned: Any, words: Sequence[str]) -> tuple[Architecture, str | None]:
    """The architecture that a verb's configuration is for, and a note where it had to be guessed.

    It is `model.architecture`, else that of the folder `model.init` or `checkpoint`. A folder that does not exist yet
    is taken for the model of conf/model whose name is in its name or in that of the experiment.

    Raises:
        ConfigError: none of them tells.
    """
    trained = isinstance(planned, TrainConfig)
    source = planned.model.init if trained else planned.checkpoint
    shape, note = (planned.model.architecture if trained else None), None
    if shape is None and source is not None and Path(source).is_dir():
        shape = _of_folder(Path(source))
    if shape is None:
        experiments = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
        name = _named_in([Path(part).name for part in (source, *experiments) if part])
        if name is None:
            key, group = ("model.init", "model=llama2_13b") if trained else ("checkpoint", "checkpoint=llama2_13b")
            what = f"{key}={source}: no such folder, and no model's name in it" if source else f"{key} is missing"
            raise ConfigError(f"{what}; name the model, e.g. {group}")
        shape = OmegaConf.load(conf_folder() / "model" / f"{name}.yaml").architecture
        note = f"the architecture is that of conf/model/{name}.yaml, by its name"
    found: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), shape))
    if not found.vocab_size:
        raise ConfigError("model.architecture.vocab_size=0 is the tokenizer's; give it, e.g. 32000")
    return found, note


def _of_folder(folder: Path) -> Any:
    """The architecture of a model folder or a Hugging Face folder, None for neither."""
    if (folder / "model_config.yaml").is_file():
        return read_yaml(folder / "model_config.yaml", CheckpointError)["architecture"]
    if (folder / "config.json").is_file():
        from nemo_steerlm.formats.hf_config import architecture_from_config, read_config  # and with it torch

        return architecture_from_config(read_config(folder / "config.json"), folder / "config.json")
    return None


def _named_in(texts: Sequence[str]) -> str | None:
    """The longest name of conf/model that is in one of the texts, the first text first."""
    names = sorted((file.stem for file in (conf_folder() / "model").glob("*.yaml")), key=len, reverse=True)
    return next((name for text in texts for name in names if name in text), None)


def _data(settings: PlanConfig, planned: TrainConfig) -> tokens.Data | None:
    """The data set: counted, or as given."""
    if settings.data is None:
        if settings.samples is None:
            return None
        count = settings.tokens or settings.samples * planned.data.max_length
        return tokens.Data(samples=settings.samples, tokens=count)
    tokenizer, trainer = _tokenizer(planned.model), planned.trainer
    return tokens.count(
        Path(settings.data), regressor=isinstance(planned, TrainRegressorConfig), schema=planned.attributes.require(),
        template=planned.template.build(tokenizer) if tokenizer is not None else PromptTemplate(), tokenizer=tokenizer,
        max_length=planned.data.max_length, overlong=planned.data.overlong, batch=trainer.global_batch_size,
        micro_batch=trainer.micro_batch_size, equal_lengths=planned.parallel.pipeline > 1,
    )  # fmt: skip


def _tokenizer(model: ModelConfig) -> Tokenizer | None:
    """The model's tokenizer, None where it is not there yet."""
    for path in (model.tokenizer, model.init and Path(model.init) / "tokenizer", model.init):
        if path is not None and Path(path).exists():
            return load_tokenizer(path)
    return None

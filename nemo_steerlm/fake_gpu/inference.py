"""Reading or generation by one rank at full size: the job of `dry_run.measure_inference`."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from omegaconf import OmegaConf

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import AnnotateConfig, Architecture, GenerateConfig, SampleConfig, SamplingConfig
from nemo_steerlm.config.gpus import GPUS
from nemo_steerlm.fake_gpu.mode import FakeGpu
from nemo_steerlm.fake_gpu.rank import AnyTokenizer
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.megatron.inference import batch_tokens_by_default
from nemo_steerlm.models.base import model_config
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.tokenizer import Tokenizer

CONFIGS: dict[str, type[Any]] = {"annotate": AnnotateConfig, "sample": SampleConfig, "generate": GenerateConfig}
PART = "inference"
_NEW = 2  # tokens that are drawn: the caches have their full size from the start


def measure(
    gpu: FakeGpu, verb: str, settings: dict[str, Any], shape: dict[str, Any], stage: int, head: str, longest: int
) -> dict[str, Any]:
    """The fields of `dry_run.MeasuredInference`, but for its seconds.

    Args:
        verb, settings: a key of `CONFIGS`, and the plain values of that configuration.
        shape: the plain values of the architecture.
        stage, head, longest: as `dry_run.measure_inference`'s.
    """
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CONFIGS[verb]), settings))
    architecture: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), shape))
    if config.trainer.gpu is not None:
        gpu.size = int(GPUS[config.trainer.gpu].memory)
    parallel.initialize(config.parallel)
    reads = verb == "annotate"
    cls = AttributeRegressor if reads else AttributeConditionedGPT
    schema = AttributeSchema.load("helpsteer")
    card = ModelCard(kind=cls.kind, architecture=architecture, schema=schema, head=head)
    layout = dataclasses.replace(config.parallel, sequence=False, virtual_pipeline=None)  # as `from_pretrained`
    cfg = model_config(card, parallel=layout, precision=config.trainer.precision)
    model: Any = cls.variant(card)(cfg, cast(Tokenizer, AnyTokenizer(architecture.vocab_size)))
    model.build(initialise=False)
    model.eval()
    gpu.memory.restart()
    waits, sent = gpu.waits.copy(), gpu.sent.copy()
    with gpu.memory.of(PART):
        rows = _read(model, config, longest) if reads else _generate(model, config, longest)
    return dict(
        stage=stage, parameters=sum(p.numel() for chunk in model.chunks for p in chunk.parameters()), rows=rows,
        peak=gpu.memory.peak, parts={part: size for part, size in gpu.memory.at_peak.items() if size},
        sent=gpu.sent - sent, waits=gpu.waits - waits,
    )  # fmt: skip


def _texts(count: int, length: int) -> list[list[int]]:
    """Texts without a common prefix."""
    return [[1 + number] * length for number in range(count)]


def _read(model: Any, config: AnnotateConfig, longest: int) -> int:
    """One forward pass that is full; the number of its texts."""
    length = min(longest, config.max_length or longest)
    texts = _texts(max(1, (config.batch_tokens or batch_tokens_by_default()) // length), length)
    (model.distribution if config.distributions else model.predict)(texts, config.batch_tokens)
    return len(texts)


def _generate(model: Any, config: SampleConfig | GenerateConfig, longest: int) -> int:
    """Prompts that leave room for `_NEW` tokens, and these; the number of rows that decoded together."""
    wanted = config.batch_size if isinstance(config, SamplingConfig) else 1
    ways = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p or 1.0)
    together: list[int] = []
    model.sample(
        _texts(wanted, longest - _NEW), SamplingSettings(max_new_tokens=_NEW, **cast(Any, ways)), batch_size=wanted,
        progress=lambda ended, drawn: together.append(drawn),
    )  # fmt: skip
    return max(together)

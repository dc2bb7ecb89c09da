"""Make the model a training begins with: from a model folder, a Hugging Face folder, or random weights."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import Architecture, ModelConfig, TrainConfig, TrainRegressorConfig, default_rate
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import hf, hf_folder, model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.formats.safetensors_files import SafetensorsFolder
from nemo_steerlm.megatron import finite
from nemo_steerlm.megatron.parallel import is_rank_zero
from nemo_steerlm.models.base import MegatronModel, model_config
from nemo_steerlm.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

_log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=MegatronModel)


def start_model(cls: type[Model], config: TrainConfig, schema: AttributeSchema) -> Model:
    """Build a model of class `cls` with the weights that `config.model` names; process groups exist already.

    Sets `config.optimizer.lr` to its default where none is given.

    A trained policy or regressor keeps its prompt template; otherwise `config.template` is used, which is logged where
    the model has another chat template of its own. The head of a regressor is kept where its attributes are the same,
    or where it is a sequence classifier with as many unnamed outputs.

    Raises:
        ConfigError: the layout does not divide the model.
        CheckpointError: the folder is missing, damaged, or was trained on other attributes.
    """
    if config.optimizer.lr is None:
        config.optimizer.lr, kind = default_rate(config)
        if is_rank_zero():
            _log.info("optimizer.lr: %g (default for %s)", config.optimizer.lr, kind)
    source = config.model.init
    if source is None:
        architecture, tokenizer = _random(config.model)
        template = config.template.build(tokenizer)
        card = ModelCard(kind=cls.kind, architecture=architecture, template=template, schema=schema)
        model = make_model(cls, config, card, tokenizer)
        model.build()
    else:
        theirs = hf_folder.is_folder(Path(source))
        origin = hf_folder.read_card(Path(source)) if theirs else model_folder.read(source)
        if origin.kind == "policy" and cls.kind == "policy" and origin.schema != schema:
            raise CheckpointError(
                f"{source} was trained on the attributes {origin.schema}, but attributes asks for "
                f"{schema}; give the same attributes, or start from a language model"
            )
        tokenizer = (load_tokenizer if theirs else model_folder.read_tokenizer)(source)
        template = origin.template
        if origin.kind == "language_model" or (theirs and not hf_folder.is_ours(Path(source))):
            template = config.template.build(tokenizer, origin.ends)
            if tokenizer.chat_template is not None and not config.template.own:
                _log.info(
                    "%s has a chat template of its own; turns are written with %r here, template=own keeps to it",
                    source, template.turn_start,
                )  # fmt: skip
        card = dataclasses.replace(origin, kind=cls.kind, schema=schema, template=template)
        model = make_model(cls, config, card, tokenizer)
        if theirs:
            model.build(initialise=False)
            fresh, outputs = model.fresh_parameters(origin), hf_folder.outputs_of(origin)
            hf.load(SafetensorsFolder(Path(source)), model.chunks, origin.architecture, outputs, head=not fresh)
            finite.check(source, finite.parameters(model.chunks), finite.DAMAGED)
        else:
            model.load_weights(source)
    return model


def _with_head(card: ModelCard, config: TrainConfig) -> ModelCard:
    """The model metadata with the head of a regressor's configuration; where it names none, that of the source."""
    if not isinstance(config, TrainRegressorConfig):
        return card
    return dataclasses.replace(card, head=config.head or card.head, pooling=config.model.pooling or card.pooling)


def _random(model: ModelConfig) -> tuple[Architecture, Tokenizer]:
    assert model.architecture is not None and model.tokenizer is not None, "ModelConfig.validate refuses that"
    tokenizer = load_tokenizer(model.tokenizer)
    size = model.architecture.vocab_size or tokenizer.vocab_size
    return dataclasses.replace(model.architecture, vocab_size=size), tokenizer


def make_model(cls: type[Model], config: TrainConfig, card: ModelCard, tokenizer: Tokenizer) -> Model:
    """A model of class `cls`, or of the variant for its head, with the training settings of `config`; not built yet.

    Raises:
        ConfigError: packed rows with dropout on attention weights.
        CheckpointError: the tokenizer has more ids than the model has rows.
    """
    card = _with_head(card, config)
    check_vocabulary(tokenizer, card.architecture.vocab_size, config.model.init or "of random weights")
    dropout = card.architecture.attention_dropout
    if dropout and config.data.row_length() is not None:
        raise ConfigError(
            f"data.packing=true with attention_dropout={dropout:g} in the model's architecture: packed attention "
            "kernels have no dropout; use data.packing=false, or a model without"
        )
    cfg = model_config(
        card,
        parallel=config.parallel,
        precision=config.trainer.precision,
        recompute=config.trainer.recompute,
        lora=OmegaConf.to_container(OmegaConf.structured(config.model.lora)),
        freeze=config.model.freeze,
        optimizer=OmegaConf.to_container(OmegaConf.structured(config.optimizer)),
        max_steps=config.trainer.max_steps,
        seed=config.seed,
    )
    return cls.variant(card)(cfg, tokenizer)

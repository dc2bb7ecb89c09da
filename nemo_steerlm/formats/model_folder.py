"""The model folder: `model_config.yaml attributes.yaml tokenizer/ weights/`, readable at any layout.

Every step passes one to the next: a trained regressor or policy, or an imported language model (which has no
`attributes.yaml` yet).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_steerlm import hub, integrity
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import Architecture
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.megatron import checkpoint, finite, lora
from nemo_steerlm.megatron.deferred import deferring
from nemo_steerlm.megatron.parallel import is_rank_zero
from nemo_steerlm.ownership import UNFINISHED
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from nemo_steerlm.yaml_file import read_yaml

FORMAT = 1
KINDS = ("language_model", "policy", "regressor")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Model metadata: the description of a model in its folder.

    Attributes:
        kind: "language_model" (imported, without attributes), "policy" or "regressor".
        schema: the attributes it was trained on, None for a language model.
        head: of a regressor: "regression" (one output an attribute), "ordinal", "distribution", or "generative" (a
            language model, without a head of its own).
        pooling: of a regressor: the "last" token, or the "mean" over all tokens.
        ends: end-of-text ids of a generating model, besides its tokenizer's.
    """

    kind: str
    architecture: Architecture
    template: PromptTemplate = field(default_factory=PromptTemplate)
    schema: AttributeSchema | None = None
    head: str = "regression"
    pooling: str = "last"
    ends: tuple[int, ...] = ()


def write(folder: Path | str, card: ModelCard, tokenizer: Tokenizer, chunks: list[Any]) -> None:
    """Write a model folder with merged adapters; all ranks call it. It appears only when it is complete.

    Raises:
        CheckpointError: a weight is not finite; nothing is written.
    """
    folder = Path(folder)
    weights = lora.merged_state(chunks)
    finite.check(f"{folder} is not written", finite.stored(weights), finite.DIVERGED)
    partial = folder.with_name(folder.name + UNFINISHED)
    if is_rank_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        ends = [token for token in card.ends if token != tokenizer.eos_id and card.kind != "regressor"]
        config = {
            "format": FORMAT,
            "kind": card.kind,
            "architecture": OmegaConf.to_container(OmegaConf.structured(card.architecture)),
            "template": card.template.to_dict(),
            "tokenizer": {"fingerprint": tokenizer.fingerprint},
            **({"head": card.head, "pooling": card.pooling} if card.kind == "regressor" else {}),
            **({"ends": ends} if ends else {}),
        }
        OmegaConf.save(OmegaConf.create(config), partial / "model_config.yaml")
        if card.schema is not None:
            card.schema.save(partial / "attributes.yaml")
        tokenizer.save(partial / "tokenizer")
    checkpoint.save(partial / "weights", weights)
    if is_rank_zero():
        integrity.write_sums(partial)
    checkpoint.replace_folder(partial, folder)


def is_model_folder(folder: Path | str) -> bool:
    """Whether the folder was written by `write`."""
    return (Path(folder) / "model_config.yaml").is_file()


def read(folder: Path | str) -> ModelCard:
    """Read the metadata of a model folder; all its files but the weights are checked (`integrity`).

    Raises:
        CheckpointError: no model folder, an unknown format, or a damaged file.
    """
    folder = Path(folder)
    path = folder / "model_config.yaml"
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such model folder; make one with `steerlm import` or a training verb")
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: a file, expected a model folder; `steerlm import input={folder} output=FOLDER` makes one"
        )
    if not path.is_file():
        where = hub.named(str(folder))
        raise CheckpointError(
            f"{where}: not a model folder (no model_config.yaml); expected the model/ of a run or what "
            f"`steerlm import{f' input={where}' if where != str(folder) else ''}` wrote"
        )
    integrity.check(folder)
    try:
        data = read_yaml(path, CheckpointError)
        assert isinstance(data, dict)
        if "${" in str(data["architecture"]):  # OmegaConf would read our environment for it
            raise CheckpointError(f"{path}: architecture holds an interpolation, expected plain values")
        if data["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {data['format']}, this version reads {FORMAT}")
        architecture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Architecture), data["architecture"]))
        attributes = folder / "attributes.yaml"
        return ModelCard(
            kind=data["kind"],
            architecture=architecture,  # type: ignore[arg-type]
            template=PromptTemplate.from_dict(data["template"]),
            schema=AttributeSchema.load(attributes) if attributes.is_file() else None,
            ends=tuple(int(token) for token in data.get("ends", ())),
            **{key: data[key] for key in ("head", "pooling") if key in data},
        )
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError, AssertionError, UnicodeError) as error:
        raise CheckpointError(f"{path}: damaged model configuration: {error}") from error


def read_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer the model was trained with.

    Raises:
        CheckpointError: the tokenizer's files are not the ones the model was saved with, or have more tokens.
    """
    with deferring():  # transformers' part of it
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    path = Path(folder) / "model_config.yaml"
    try:
        config = read_yaml(path, CheckpointError)
        expected, size = str(config["tokenizer"]["fingerprint"]), config["architecture"].get("vocab_size")
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: damaged model configuration: no tokenizer.fingerprint") from None
    if size:
        check_vocabulary(tokenizer, int(size), folder)
    if tokenizer.fingerprint != expected:
        raise CheckpointError(
            f"{folder}/tokenizer: fingerprint {tokenizer.fingerprint[:12]}, but the weights were trained with "
            f"{expected[:12]} ({path}); put the original tokenizer files back"
        )
    return tokenizer


def load_weights(folder: Path | str, chunks: list[Any], *, skip: tuple[str, ...] = ()) -> None:
    """Load the weights into chunks of any layout.

    Args:
        skip: parameters (prefixes of their names) that keep their current values, such as a new head `score.`.

    Raises:
        CheckpointError: the weights are damaged, not finite, or not those of the chunks.
    """
    state = checkpoint.model_state(chunks)
    if "score.bias" in checkpoint.stored_names(Path(folder) / "weights") and not skip:
        raise CheckpointError(f"{folder}: a regressor of an earlier version, whose head has a bias; train it again")
    for chunk_state in state.values():
        for name in [n for n in chunk_state if n.startswith(skip)] if skip else []:
            del chunk_state[name]
    loaded = checkpoint.load(Path(folder) / "weights", state)
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [n for n in missing if not n.startswith(skip or ("\0",)) and not n.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(f"{folder}: missing weights {missing[:5]}, unexpected weights {unexpected[:5]}")
    finite.check(folder, finite.parameters(chunks), finite.DAMAGED)

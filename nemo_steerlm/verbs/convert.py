"""`steerlm import` and `steerlm export`: model folders from and to other formats."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.calibration import FILE as CORRECTION
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.chat_template import own_strings
from nemo_steerlm.config import Architecture, ExportConfig, ImportConfig
from nemo_steerlm.errors import CheckpointError, ConfigError, suggest
from nemo_steerlm.formats import gguf, hf, hf_config, hf_folder, llama2c, model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.formats.safetensors_files import SafetensorsFolder
from nemo_steerlm.formats.vocabulary import MoreRows, with_attribute_tokens
from nemo_steerlm.integrity import listing
from nemo_steerlm.megatron import checkpoint, dtypes, finite, gpt, parallel
from nemo_steerlm.ownership import UNFINISHED
from nemo_steerlm.provenance import write_run_json
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from nemo_steerlm.verbs.describe import readme

logger = logging.getLogger(__name__)


def import_main(config: ImportConfig) -> str:
    """Turn a checkpoint of another format into a model folder.

    Args:
        config: `input` (a Hugging Face folder, a .gguf file or a llama2.c .bin file), `output`, `tokenizer` (a folder
            or a SentencePiece file; None: the input's own), `attributes` (names of a sequence classifier's outputs),
            `template` (the prompt; None: a language model's own chat template where it can be expressed, else
            SteerLM's), `trainer` and `parallel` (each process reads only its part).

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: the input is of no family this package knows (`families.FAMILIES`), or is incomplete.
        ConfigError: a setting is wrong, the tokenizer is missing or has more tokens than the model, or the attributes
            do not fit the model.
    """
    parallel.start(config)
    with tempfile.TemporaryDirectory() as folder:
        return _import(config, Path(folder))


def _import(config: ImportConfig, scratch: Path) -> str:
    schema = config.attributes.load()
    source, card = open_checkpoint(Path(config.input), schema)
    quantised = isinstance(source, gguf.GgufFile)
    outputs = hf_folder.outputs_of(card)
    hf.check_tensors(source, card.architecture, outputs)
    tokenizer = _tokenizer(config, source, card.architecture)
    if schema is not None and card.kind == "language_model":
        first = tokenizer.vocab_size
        tokenizer = with_attribute_tokens(tokenizer, schema, scratch)
        source = MoreRows(source, first, tokenizer.vocab_size)
        size = max(card.architecture.vocab_size, tokenizer.vocab_size)
        card = dataclasses.replace(card, architecture=dataclasses.replace(card.architecture, vocab_size=size))
    if not (source.where.is_dir() and hf_folder.is_ours(source.where)):
        card = dataclasses.replace(card, template=_template(config, source.where, card, tokenizer))
    output = _output(config.output, "model_config.yaml")
    dtype = torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float32  # fp16 has no training mode here
    if quantised:  # quantisation is lossy
        logger.info("%s: %s, read as %s", source.where, source.format, dtypes.name(dtype))
    chunks = gpt.build(card.architecture, config.parallel, dtype, outputs, initialise=False)
    hf.load(source, chunks, card.architecture, outputs)
    finite.check(source.where, finite.parameters(chunks), finite.DAMAGED)
    calibration = None if card.schema is None else Calibration.read(source.where, card.schema)
    model_folder.write(output, card, tokenizer, chunks)
    if parallel.is_rank_zero():
        if calibration is not None:
            calibration.write(output)
        inputs = [source.where]
        if source.where.is_dir():
            inputs = [source.where / "config.json", *sorted(source.where.glob("*.safetensors"))]
        with listing(output, "run.json"):
            write_run_json(
                output, "import", config, inputs=inputs, schema=card.schema,
                source={"format": source.format, "read_as": dtypes.name(dtype)},
            )  # fmt: skip
    ranges = "" if card.schema is None else " of " + ", ".join(f"{a.name} {a.low} to {a.high}" for a in card.schema)
    return f"{output}: {card.kind}{ranges} with {_count(card):,} parameters in {dtypes.name(dtype)}"


def open_checkpoint(path: Path, schema: AttributeSchema | None = None) -> tuple[hf.TensorSource, ModelCard]:
    """Open a Hugging Face folder, a GGUF file or a llama2.c file without reading its weights.

    A policy or regressor that `export_main` wrote is recognised, with its attributes and template. Another sequence
    classifier becomes a regressor.

    Args:
        schema: the names of a sequence classifier's outputs, in order; None: its own labels.

    Raises:
        CheckpointError: nothing exists there, or its format is unknown.
        ConfigError: `schema` does not fit, or is missing where the labels are not names.
    """
    if path.is_file():
        if path.suffix == ".bin":
            file = llama2c.Llama2cFile(path)
            return file, ModelCard(kind="language_model", architecture=file.architecture)
        if path.suffix == gguf.SUFFIX:
            packed = gguf.GgufFile(path)
            return packed, ModelCard(kind="language_model", architecture=packed.architecture, ends=packed.ends)
        raise CheckpointError(f"{path}: expected a Hugging Face folder, a .gguf file or a llama2.c .bin file")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder or file")
    if model_folder.is_model_folder(path):
        raise CheckpointError(f"{path}: already a model folder; use it as it is")
    card = hf_folder.read_card(path)
    return SafetensorsFolder(path), _named(card, path, schema)


def _named(card: ModelCard, path: Path, schema: AttributeSchema | None) -> ModelCard:
    """The model metadata with the attributes that the user gave the outputs of a sequence classifier."""
    labels = () if card.schema is None else card.schema.names
    if schema is None:
        if card.kind == "regressor" and hf_folder.unnamed(card.schema):
            raise ConfigError(
                f"{path}: a sequence classifier whose {len(labels)} outputs have no names; name them with "
                f"attributes=FILE.yaml, in order"
            )
        return card
    if card.kind == "language_model":
        return card  # its tokenizer learns them
    if card.kind != "regressor":
        raise ConfigError(f"{path} is a {card.kind}, which has attributes already; leave attributes out")
    if len(schema) != len(labels):
        raise ConfigError(
            f"attributes gives {len(schema)} names ({', '.join(schema.names)}), but {path} has {len(labels)} outputs "
            f"({', '.join(labels)}); give one name an output, in order"
        )
    if not hf_folder.unnamed(card.schema) and labels != schema.names:
        raise ConfigError(
            f"attributes gives the names {', '.join(schema.names)}, but the outputs of {path} are "
            f"{', '.join(labels)}; leave attributes out, or give these names with ranges"
        )
    return dataclasses.replace(card, schema=schema)


def export_main(config: ExportConfig) -> str:
    """Turn a model folder into a Hugging Face folder that transformers, vLLM and others load.

    A regressor becomes a sequence classifier: stock transformers predicts what `annotate` does, with the chat template
    in the folder. A linear head cannot hold the regressor's calibration: it is written as `calibration.json`, and
    transformers predicts what `annotate calibrated=false` does. README.md describes the model, for the hub too.

    Args:
        config: `checkpoint` (a model folder), `output`, `dtype` ("float32", "bfloat16" or "float16"; None: as stored),
            `scalar` (weights of a regressor's attributes: write their weighted sum as the one output; empty: all
            outputs), `trainer` and `parallel`.

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: no model folder, or a regressor that transformers cannot express: its head is more than a
            linear layer on the last token, or transformers tokenises differently.
        ConfigError: a setting is wrong, or `scalar` names an unknown attribute or has only zero weights.
    """
    parallel.start(config)
    folder = Path(config.checkpoint)
    card = model_folder.read(folder)
    _check_expressible(folder, card)
    weights = _scalar_weights(config.scalar, card, folder)
    calibration = None if card.schema is None else Calibration.read(folder, card.schema)
    stored = checkpoint.stored_dtype(folder / "weights")
    dtype = stored if config.dtype is None else dtypes.STORED[config.dtype]
    tokenizer = model_folder.read_tokenizer(folder)
    output = _output(config.output, "config.json")
    chunks = gpt.build(card.architecture, config.parallel, stored, hf_folder.outputs_of(card), initialise=False)
    model_folder.load_weights(folder, chunks)
    if weights is not None:
        card = _to_scalar(card, chunks, weights)
    partial = output.with_name(output.name + UNFINISHED)

    def describe() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            hf_folder.write_card(partial, card, tokenizer, dtypes.name(dtype))
        except CheckpointError:
            shutil.rmtree(partial)
            raise
        if calibration is not None and weights is None:
            calibration.write(partial)
        text = readme(".", card, tokenizer, folder, partial, _remarks(config, card, calibration))
        (partial / "README.md").write_text(text, encoding="utf-8")
        write_run_json(partial, "export", config, inputs=[folder], schema=card.schema)

    parallel.on_rank_zero(describe)
    hf.save(partial, chunks, card.architecture, dtype, outputs=hf_folder.outputs_of(card))
    checkpoint.replace_folder(partial, output)
    said = f"{output}: Hugging Face {card.kind} with {_count(card):,} parameters in {dtypes.name(dtype)}"
    if card.schema is not None and card.kind == "regressor" and len(card.schema) > 1:
        said += f"; what reads one output, as RewardBench does, takes {card.schema.names[0]} alone: use scalar="
    if calibration is None:
        return said
    where = f"apply {CORRECTION} to them" if weights is None else "the sum is of raw values"
    return f"{said}; its values are those before the stored {calibration.method} calibration: {where}"


def _remarks(config: ExportConfig, card: ModelCard, calibration: Calibration | None) -> list[str]:
    """What README.md says of an exported regressor's values."""
    found = []
    if config.scalar:
        terms = " + ".join(f"{weight:g} × {name}" for name, weight in config.scalar.items()).replace("+ -", "- ")
        found.append(f"Its one output is {terms}; the figures below are of the single attributes.")
    if calibration is not None:
        where = "which is not part of the sum" if config.scalar else f"which is in `{CORRECTION}`"
        found.append(f"Its values are those before the regressor's {calibration.method} calibration, {where}.")
    return found


def _check_expressible(folder: Path, card: ModelCard) -> None:
    """Refuse what transformers' sequence classifiers, a linear head on the last token, do not compute."""
    for trait, only in (("head", "regression"), ("pooling", "last")):
        found = getattr(card, trait, only)
        if card.kind == "regressor" and found != only:
            raise CheckpointError(
                f"{folder}: a regressor with {trait}={found} has no counterpart in transformers; only {trait}={only} "
                f"can be exported"
            )


def _scalar_weights(scalar: dict[str, float], card: ModelCard, folder: Path) -> torch.Tensor | None:
    """The weights of all attributes `[1, K]` in float64, None where no scalar is asked for."""
    if not scalar:
        return None
    if card.kind != "regressor" or card.schema is None:
        raise ConfigError(f"scalar weighs a regressor's attributes, but {folder} is a {card.kind}; leave it out")
    for name in scalar:
        if name not in card.schema:
            raise ConfigError(
                f"scalar.{name}: no such attribute{suggest(name, card.schema.names)} (known: "
                f"{', '.join(card.schema.names)})"
            )
    if not any(scalar.values()):
        raise ConfigError("scalar: every weight is zero, so every score would be zero; give one that is not")
    return torch.tensor([[scalar.get(name, 0.0) for name in card.schema.names]], dtype=torch.float64)


def _to_scalar(card: ModelCard, chunks: list[Any], weights: torch.Tensor) -> ModelCard:
    """Replace the outputs by their weighted sum, which is linear too; its attribute is "reward"."""
    assert card.schema is not None
    for chunk in chunks:
        if hasattr(chunk, "score"):
            head = chunk.score.weight.data
            chunk.score.weight = torch.nn.Parameter((weights.to(head.device) @ head.double()).float())
    ends = [sorted((w * a.low, w * a.high)) for w, a in zip(weights[0].tolist(), card.schema, strict=True)]
    low, high = math.floor(sum(low for low, _ in ends)), math.ceil(sum(high for _, high in ends))
    reward = Attribute("reward", low, max(high, low + 1), description="weighted sum of a regressor's attributes")
    return dataclasses.replace(card, schema=AttributeSchema([reward]))


def _template(config: ImportConfig, where: Path, card: ModelCard, tokenizer: Tokenizer) -> PromptTemplate:
    """The prompt template of an imported model."""
    if config.template is not None:
        return config.template.build(tokenizer, card.ends)
    if card.kind != "language_model" or tokenizer.chat_template is None:
        return PromptTemplate()
    try:
        strings = own_strings(tokenizer)
    except ConfigError as error:
        logger.info("%s: prompted with SteerLM's markers: %s", where, error)
        return PromptTemplate()
    return PromptTemplate(**strings)


def _tokenizer(config: ImportConfig, source: hf.TensorSource, architecture: Architecture) -> Tokenizer:
    folder = config.tokenizer or source.tokenizer_folder()
    if folder is None:
        raise ConfigError(f"{source.where}: holds no tokenizer; name its folder or SentencePiece file with tokenizer=")
    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as error:
        if config.tokenizer is not None:
            raise
        raise ConfigError(f"{error}; name another one with tokenizer=") from error
    check_vocabulary(tokenizer, architecture.vocab_size, source.where)
    return tokenizer


def _output(path: str, marker: str) -> Path:
    """The folder to write; only an earlier result may be replaced."""
    output = Path(path)
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"output={path}: exists, and is no earlier result (no {marker} in it); choose another place")
    return output


def _count(card: ModelCard) -> int:
    shapes = hf_config.tensor_shapes(card.architecture, hf_folder.outputs_of(card))
    return sum(torch.Size(shape).numel() for shape in shapes.values())

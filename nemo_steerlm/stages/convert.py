"""`steerlm import` and `steerlm export`: model folders from and to the formats of others."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import Architecture, ParallelConfig
from nemo_steerlm.errors import CheckpointError, ConfigError, suggest
from nemo_steerlm.megatron import checkpoint, gpt, hf, hf_config, llama2c, model_folder, parallel
from nemo_steerlm.megatron.model_folder import ModelCard
from nemo_steerlm.provenance import write_run_json
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STEERLM = "steerlm"  # our key in an exported config.json: what makes a policy steerable


def import_main(config: Any) -> str:
    """Turn a checkpoint of others into a model folder.

    Args:
        config: `input` (a Hugging Face folder or a llama2.c .bin file), `output`, `tokenizer` (a folder or a
            SentencePiece file; None: the input folder's own), and optionally `parallel` (the layout of the started
            processes; each reads only its part).

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: the input is of no family this package knows (`families.FAMILIES`), or is incomplete.
        ConfigError: the tokenizer is missing or has more tokens than the model.
    """
    source, card = open_checkpoint(Path(config.input))
    hf.check_tensors(source, card.architecture)
    tokenizer = _tokenizer(config, source.where, card.architecture)
    output = _output(config.output, "model_config.yaml")
    layout = _start(config)
    dtype = torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float32  # fp16 has no training mode here
    chunks = gpt.build(card.architecture, layout, dtype)
    hf.load(source, chunks, card.architecture)
    model_folder.write(output, card, tokenizer, chunks)
    if parallel.is_rank_zero():
        inputs = [source.where]
        if source.where.is_dir():
            inputs = [source.where / "config.json", *sorted(source.where.glob("*.safetensors"))]
        write_run_json(output, "import", config, inputs=inputs, schema=card.schema)
    return f"{output}: {card.kind} with {_count(card.architecture):,} parameters in {_name(dtype)}"


def open_checkpoint(path: Path) -> tuple[hf.TensorSource, ModelCard]:
    """Open a Hugging Face folder or a llama2.c file without reading its weights.

    A policy that `export_main` wrote is known as one again, with its attributes and template.

    Raises:
        CheckpointError: there is nothing, or nothing that this package reads.
    """
    if path.is_file():
        if path.suffix == ".bin":
            file = llama2c.Llama2cFile(path)
            return file, ModelCard(kind="language_model", architecture=file.architecture)
        raise CheckpointError(f"{path}: expected a Hugging Face folder or a llama2.c .bin file")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder or file")
    if model_folder.is_model_folder(path):
        raise CheckpointError(f"{path}: already a model folder; use it as it is")
    data = hf_config.read_config(path / "config.json")
    architecture = hf_config.architecture_from_config(data, path / "config.json")
    own = data.get(_STEERLM)
    if own is None:
        return hf.SafetensorsFolder(path), ModelCard(kind="language_model", architecture=architecture)
    try:
        schema, template = AttributeSchema.load(own["attributes"]), PromptTemplate.from_dict(own["template"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'config.json'}: damaged key {_STEERLM!r}: {error}") from error
    card = ModelCard(kind="policy", architecture=architecture, template=template, schema=schema)
    return hf.SafetensorsFolder(path), card


def export_main(config: Any) -> str:
    """Turn a model folder into a Hugging Face folder that transformers, vLLM and others load.

    Args:
        config: `checkpoint` (a model folder), `output`, `dtype` ("float32", "bfloat16" or "float16"; None: as stored),
            and optionally `parallel`.

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: no model folder, or a regressor's.
        ConfigError: unknown dtype.
    """
    folder = Path(config.checkpoint)
    card = model_folder.read(folder)
    if card.kind == "regressor":
        raise CheckpointError(
            f"{folder}: a regressor, whose head has no counterpart in a Hugging Face Llama; only policies and "
            f"language models can be exported"
        )
    stored = checkpoint.stored_dtype(folder / "weights")
    dtype = stored if config.dtype is None else DTYPES.get(config.dtype)
    if dtype is None:
        raise ConfigError(
            f"dtype={config.dtype}: unknown; expected one of {', '.join(DTYPES)}" + suggest(str(config.dtype), DTYPES)
        )
    tokenizer = model_folder.read_tokenizer(folder)
    output = _output(config.output, "config.json")
    layout = _start(config)
    chunks = gpt.build(card.architecture, layout, stored)
    model_folder.load_weights(folder, chunks)
    partial = output.with_name(output.name + checkpoint.UNFINISHED)
    if parallel.is_rank_zero():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_config(partial, card, tokenizer, _name(dtype))
        write_run_json(partial, "export", config, inputs=[folder], schema=card.schema)
    hf.save(partial, chunks, card.architecture, dtype)
    checkpoint.replace_folder(partial, output)
    return f"{output}: Hugging Face {card.kind} with {_count(card.architecture):,} parameters in {_name(dtype)}"


def _write_config(folder: Path, card: ModelCard, tokenizer: Tokenizer, dtype: str) -> None:
    """Everything but the weights."""
    data = hf_config.config_from_architecture(card.architecture, dtype)
    data |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if card.schema is not None:
        data[_STEERLM] = {"attributes": card.schema.to_dict(), "template": card.template.to_dict()}
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    described = folder / "tokenizer_config.json"
    if (folder / "tokenizer.model").is_file() and not described.is_file():  # a bare SentencePiece file: say what it is
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": card.schema is None, "legacy": False}
        described.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _tokenizer(config: Any, source: Path, architecture: Architecture) -> Tokenizer:
    if config.tokenizer is None and not source.is_dir():
        raise ConfigError(f"{source}: holds no tokenizer; name its folder or SentencePiece file with tokenizer=")
    try:
        tokenizer = load_tokenizer(config.tokenizer or source)
    except ConfigError as error:
        if config.tokenizer is not None:
            raise
        raise ConfigError(f"{error}; name another one with tokenizer=") from error
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(
            f"tokenizer {config.tokenizer or source}: {tokenizer.vocab_size} tokens, but the model {source} has "
            f"{architecture.vocab_size}; it belongs to another model"
        )
    return tokenizer


def _output(path: str, marker: str) -> Path:
    """The folder to write; an earlier result may be replaced, anything else may not."""
    output = Path(path)
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"output={path}: exists, and is no earlier result (no {marker} in it); choose another place")
    return output


def _start(config: Any) -> ParallelConfig:
    layout = getattr(config, "parallel", None) or ParallelConfig()
    parallel.initialize(layout)
    return layout


def _count(architecture: Architecture) -> int:
    return sum(torch.Size(shape).numel() for shape in hf_config.tensor_shapes(architecture).values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

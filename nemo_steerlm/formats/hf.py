"""Import and export of Hugging Face checkpoints, for every family and layout.

Weights move tensor by tensor: on import each rank reads only its own slice from the files, on export the parts of one
tensor after the other go to rank 0, which holds one output file (2 GiB, or one tensor where that is larger) and that
tensor in CPU memory, and one rank's part of it on a GPU. So a rank needs memory for its part of the model, for its
gate and up matrices once more while our own weights are written or read, and rank 0 for that file.

Tensor formats (`h` heads, `g` key/value groups, `d` head size): megatron-core keeps one matrix for queries, keys and
values, ordered by group as `[h/g query heads, key head, value head]`, and one for gate and up. Tensor parallelism cuts
whole groups, and gate and up each, so that a rank's part of every matrix is made of the same rank's part of the
Hugging Face tensors. The vocabulary is padded with zero rows, which only megatron-core sees.

The tables below name every family's tensors; a family has those of them that `hf_config.tensor_shapes` lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_steerlm.config import Architecture
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats.hf_config import EMBEDDING, HEAD, SCORE, tensor_shapes
from nemo_steerlm.formats.safetensors_files import SafetensorsWriter, some
from nemo_steerlm.megatron.gpt import LanguageModel
from nemo_steerlm.megatron.parallel import is_rank_zero

# Last parts of the names that GPTQ, AWQ, bitsandbytes and fp8 give to packed weights and their scales.
_QUANTISED = (".qweight", ".qzeros", ".scales", ".absmax", ".SCB", ".weight_scale", ".weight_scale_inv")

# megatron-core's name of a module -> the Hugging Face modules it is made of, and the dimension that tensor parallelism
# cuts (None: every rank has all of it). Both name what is in a module "weight" and "bias".
_OUTER: dict[str, tuple[str, int | None]] = {
    "embedding.word_embeddings": (EMBEDDING.removesuffix(".weight"), 0),
    "decoder.final_layernorm": ("model.norm", None),
    "output_layer": (HEAD.removesuffix(".weight"), 0),
    "score": (SCORE.removesuffix(".weight"), None),
}
_LAYER: dict[str, tuple[tuple[str, ...], int | None]] = {
    "input_layernorm": (("input_layernorm",), None),
    "self_attention.linear_qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
    "self_attention.q_layernorm": (("self_attn.q_norm",), None),
    "self_attention.k_layernorm": (("self_attn.k_norm",), None),
    "self_attention.linear_proj": (("self_attn.o_proj",), 1),
    "pre_mlp_layernorm": (("post_attention_layernorm",), None),
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), 0),
    "mlp.linear_fc2": (("mlp.down_proj",), 1),
}
# Transformer Engine keeps a norm inside the linear layer after it.
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class TensorSource(Protocol):
    """Tensors under their Hugging Face names, read in slices."""

    where: Path

    @property
    def format(self) -> str:
        """Description of the file format, quantisation included."""

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights are stored in."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (`dim` 0) or columns (1) `start` to `stop` of a tensor."""

    def tokenizer_folder(self) -> Path | None:
        """Folder of its tokenizer, None where it has none."""


def check_tensors(source: TensorSource, architecture: Architecture, outputs: int | None = None) -> None:
    """Compare the tensors with the configuration; `outputs` as in `tensor_shapes`.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is unknown.
    """
    expected, found = tensor_shapes(architecture, outputs), source.shapes()
    _check_kind(found, source.where)
    missing = [name for name in expected if name not in found]
    if missing:
        hint = "; a backbone without its head, or tie_word_embeddings is wrong" if missing == [HEAD] else ""
        raise CheckpointError(f"{source.where}: {len(missing)} tensors are missing: {some(missing)}{hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{source.where}: {name} has shape {list(found[name])}, its configuration asks for {list(shape)}"
            )
    # Two leftovers are common and harmless: RoPE frequencies, and a copy of tied embeddings.
    ignored = {HEAD} if architecture.tie_word_embeddings else set()
    foreign = [n for n in found if n not in expected and n not in ignored and not n.endswith("rotary_emb.inv_freq")]
    if foreign:
        raise CheckpointError(
            f"{source.where}: {len(foreign)} tensors that a {architecture.family} model does not have: {some(foreign)}"
        )


def _check_kind(names: Iterable[str], where: Path) -> None:
    """Refuse adapters, quantised weights and headless backbones, with the kind found."""
    for name in names:
        if ".lora_" in name:
            kind = "an adapter; merge it into its base model with peft's merge_and_unload, and save that"
        elif name.endswith(_QUANTISED):
            kind = "quantised weights; dequantise the model with transformers and save it, or use the original one"
        elif name == EMBEDDING.removeprefix("model."):
            kind = "a backbone without a head; save the model that has one, as AutoModelForCausalLM loads it"
        else:
            continue
        raise CheckpointError(f"{where}: holds {name}: {kind}")


def _parameters(
    chunk: LanguageModel, architecture: Architecture
) -> Iterator[tuple[tuple[str, ...], int | None, torch.nn.Parameter]]:
    """Each parameter of a chunk with its Hugging Face names (by the layer's global number) and its cut dimension."""
    shapes = tensor_shapes(architecture)
    for name, parameter in chunk.named_parameters():
        for fused, plain in _FUSED.items():
            name = name.replace(fused, plain)
        module, kind = name.rsplit(".", 1)
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", module)
        if layer:
            number = chunk.decoder.layers[int(layer[1])].layer_number - 1  # counted from 1 over all stages
            parts, dim = _LAYER[layer[2]]
            names = (f"model.layers.{number}.{part}.{kind}" for part in parts)
            yield tuple(name for name in names if name in shapes), dim, parameter
        else:
            part, dim = _OUTER[module]
            full = f"{part}.{kind}"
            if full == HEAD and architecture.tie_word_embeddings:
                full = EMBEDDING  # the last pipeline stage's copy
            yield (full,), dim, parameter


def _join(parts: list[torch.Tensor], head: int) -> torch.Tensor:
    """One rank's Hugging Face tensors -> its megatron-core matrix."""
    if len(parts) == 3:  # each `[heads * d, hidden]` (a bias `[heads * d]`); the keys' heads are the groups
        groups = parts[1].shape[0] // head
        parts = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(parts, 1).flatten(0, 1)
    return torch.cat(parts)


def _split(weight: torch.Tensor, count: int, architecture: Architecture) -> list[torch.Tensor]:
    """The inverse of `_join` for a parameter made of `count` tensors."""
    if count != 3:
        return list(weight.chunk(count))
    head, queries = architecture.head_size, architecture.num_attention_heads // architecture.key_value_heads
    grouped = weight.reshape(-1, (queries + 2) * head, *weight.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([queries * head, head, head], 1)]


@torch.no_grad()
def load(
    source: TensorSource,
    chunks: list[LanguageModel],
    architecture: Architecture,
    outputs: int | None = None,
    head: bool = True,
) -> None:
    """Fill this rank's chunks.

    Args:
        outputs: of the source, as in `tensor_shapes`.
        head: whether a regression head is read too; a language model has none to read.

    Raises:
        CheckpointError: the tensors are not those of `architecture` (`check_tensors`), or are a classifier's where the
            chunks have a vocabulary projection of their own.
    """
    check_tensors(source, architecture, outputs)
    rank = parallel_state.get_tensor_model_parallel_rank()
    world = parallel_state.get_tensor_model_parallel_world_size()
    shapes = tensor_shapes(architecture, outputs)
    for chunk in chunks:
        for names, dim, parameter in _parameters(chunk, architecture):
            if names[0] == SCORE and (outputs is None or not head):
                continue
            if names[0] not in shapes:
                raise CheckpointError(f"{source.where}: a sequence classifier; it has no {names[0]}")
            if names[0] in (EMBEDDING, HEAD):
                start = rank * parameter.shape[0]
                stop = max(start, min(start + parameter.shape[0], architecture.vocab_size))
                parameter[: stop - start] = source.read(names[0], 0, start, stop).to(parameter)
                parameter[stop - start :] = 0
                continue
            parts = []
            for name in names:
                step = 0 if dim is None else shapes[name][dim] // world
                parts.append(source.read(name, dim or 0, rank * step, (rank + 1) * step if step else None))
            parameter.copy_(_join(parts, architecture.head_size))


@torch.no_grad()
def save(
    folder: Path,
    chunks: list[LanguageModel],
    architecture: Architecture,
    dtype: torch.dtype,
    max_file_bytes: int = 2 * 2**30,
    outputs: int | None = None,
) -> None:
    """Write the weights as safetensors, by all ranks together; rank 0 writes, into an existing folder.

    Each parameter goes from the ranks that hold it to rank 0, one after the other.

    Args:
        dtype: what to store; a regression head is kept in fp32.
        max_file_bytes: largest size of a file; a larger tensor gets a file of its own.
        outputs: as in `tensor_shapes`.
    """
    held = {names: (dim, parameter) for chunk in chunks for names, dim, parameter in _parameters(chunk, architecture)}
    places = _places(held)
    shapes = tensor_shapes(architecture, outputs)
    order = list(shapes)
    sizes = {name: math.prod(shape) * _stored(name, dtype).itemsize for name, shape in shapes.items()}
    writer = SafetensorsWriter(folder, sizes, max_file_bytes) if is_rank_zero() else None
    for names in sorted(places, key=lambda key: order.index(key[0])):
        shards = _gather(held.get(names, (None, None))[1], places[names], _stored(names[0], dtype))
        if writer is None:
            continue
        split = [_split(shard, len(names), architecture) for shard in shards]
        for name, parts in zip(names, zip(*split, strict=True), strict=True):
            dim = places[names].dim
            whole = parts[0] if dim is None else torch.cat(parts, dim)
            writer.add(name, whole[: architecture.vocab_size] if name in (EMBEDDING, HEAD) else whole)
    if writer is not None:
        writer.finish()


@dataclass
class _Place:
    """Location of a parameter: the cut dimension, the shape of a rank's part, and the ranks that hold the parts."""

    dim: int | None
    shape: tuple[int, ...]
    ranks: list[int] = field(default_factory=list)


def _places(held: dict[tuple[str, ...], tuple[int | None, torch.nn.Parameter]]) -> dict[tuple[str, ...], _Place]:
    """The location of each parameter of the model, on every rank; of equal copies the first one is used."""
    mine = {}
    if parallel_state.get_data_parallel_rank() == 0:
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        mine = {names: (dim, tuple(p.shape), tensor_rank) for names, (dim, p) in held.items()}
    tables: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tables, mine)
    places: dict[tuple[str, ...], _Place] = {}
    for rank, table in enumerate(tables):  # tensor-parallel neighbours have ascending ranks
        for names, (dim, shape, tensor_rank) in table.items():
            place = places.setdefault(names, _Place(dim, shape))
            if tensor_rank == len(place.ranks) and (dim is not None or tensor_rank == 0):
                place.ranks.append(rank)
    return places


def _gather(parameter: torch.Tensor | None, place: _Place, dtype: torch.dtype) -> list[torch.Tensor]:
    """The parts of one parameter on rank 0, in CPU memory and tensor-parallel order; an empty list on the others."""
    rank = dist.get_rank()
    if rank != 0:
        if rank in place.ranks:
            assert parameter is not None
            dist.send(parameter.to(dtype).contiguous(), 0)
        return []
    shards = []
    for source in place.ranks:
        if source == 0:
            assert parameter is not None
            shards.append(parameter.detach().to(dtype).cpu())
        else:
            part = torch.empty(place.shape, dtype=dtype, device=torch.cuda.current_device())
            dist.recv(part, source)
            shards.append(part.cpu())
    return shards


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name == SCORE else dtype

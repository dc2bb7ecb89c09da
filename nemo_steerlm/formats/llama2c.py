"""Read the `.bin` checkpoints of llama2.c as a Hugging Face model.

The file (version 0, written by `export.py --version 0`): seven int32 `dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, max_seq_len`, then fp32 tensors without names, each kind for all layers, and last the cosines and sines of
RoPE, which are skipped, and the output head where it is not the embedding (`vocab_size` is then negative).

llama2.c rotates neighbouring elements (2i, 2i + 1) of a head, Hugging Face and megatron-core the halves (i, i + d/2);
reordering the rows of the query and key matrices turns one into the other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nemo_steerlm.config import Architecture
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats.hf_config import EMBEDDING, HEAD, tensor_shapes

_HEADER = 7
_VERSIONED = 0x616B3432  # "ak42": versions 1 (other order) and 2 (int8)
ROTATED = ("q_proj.weight", "k_proj.weight")
_KINDS = (  # the per-layer tensors, in the file's order
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
)  # fmt: skip


def halves(rows: torch.Tensor, head: int, start: int) -> torch.Tensor:
    """Put the rows of queries or keys, from row `start` on, into the order in which halves of a head are rotated."""
    assert start % head == 0, "queries and keys are cut between heads"
    return rows.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


class Llama2cFile:
    """A llama2.c checkpoint, memory-mapped; a `hf.TensorSource`.

    Attributes:
        architecture: read from the header. The norm's epsilon (1e-5) and RoPE's base (10000) are constants there.

    Raises:
        CheckpointError: not such a file, or its size does not match its header.
    """

    dtype = torch.float32
    format = "llama2.c"

    def __init__(self, path: Path) -> None:
        self.where = path
        with path.open("rb") as file:
            raw = file.read(4 * _HEADER)
        header = [int(value) for value in np.frombuffer(raw[: len(raw) // 4 * 4], "<i4")]
        if header and header[0] == _VERSIONED:
            raise CheckpointError(f"{path}: llama2.c version 1 or 2; only version 0 (fp32, no magic) is read")
        found = path.stat().st_size
        self.architecture = _architecture(header, path, found)
        self._head = self.architecture.head_size
        self._shapes = tensor_shapes(self.architecture)
        self._offsets, size = _offsets(self.architecture, self._shapes)
        if found != size:
            raise CheckpointError(
                f"{path}: {found} bytes, but its header (dim, hidden_dim, n_layers, n_heads, n_kv_heads, "
                f"vocab_size, max_seq_len = {', '.join(map(str, header))}) asks for {size}"
            )
        self._values = np.memmap(path, "<f4", mode="r")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of everything in the file."""
        return self._shapes

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (`dim` 0) or columns (1) `start` to `stop`, rows of queries and keys in whole heads."""
        shape, offset = self._shapes[name], self._offsets[name]
        whole = self._values[offset : offset + int(np.prod(shape))].reshape(shape)
        part = torch.from_numpy(np.array(whole[start:stop] if dim == 0 else whole[:, start:stop]))
        return halves(part, self._head, start) if name.endswith(ROTATED) else part

    def tokenizer_folder(self) -> None:
        """The file has no tokenizer."""


def _architecture(header: list[int], path: Path, size: int) -> Architecture:
    if len(header) == _HEADER:
        dim, hidden_dim, layers, heads, groups, vocabulary, length = header
        sound = min(dim, hidden_dim, layers, heads, groups, abs(vocabulary), length) > 0 and layers * dim < size
        if sound and dim % (2 * heads) == 0 and heads % groups == 0:
            return Architecture(
                num_layers=layers,
                hidden_size=dim,
                ffn_hidden_size=hidden_dim,
                num_attention_heads=heads,
                num_query_groups=groups,
                head_dim=dim // heads,
                vocab_size=abs(vocabulary),
                max_position_embeddings=length,
                norm_epsilon=1e-5,
                rope_theta=10000.0,
                tie_word_embeddings=vocabulary > 0,
            )
    raise CheckpointError(f"{path}: not a llama2.c checkpoint; its first integers are {header}")


def _offsets(architecture: Architecture, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """The offset of each tensor, in floats from the file's start, and the file's size in bytes."""
    offsets: dict[str, int] = {}
    position = _HEADER

    def place(name: str) -> None:
        nonlocal position
        offsets[name] = position
        position += int(np.prod(shapes[name]))

    place(EMBEDDING)
    for kind in _KINDS:
        for layer in range(architecture.num_layers):
            place(f"model.layers.{layer}.{kind}.weight")
    place("model.norm.weight")
    position += architecture.max_position_embeddings * architecture.head_size  # cosines and sines, d/2 each
    if not architecture.tie_word_embeddings:
        place(HEAD)
    return offsets, 4 * position

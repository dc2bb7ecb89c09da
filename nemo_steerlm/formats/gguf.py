"""Read GGUF files of Llama's architecture (llama.cpp) as a Hugging Face model.

The package `gguf` maps the file; each tensor is dequantised when it is read, so that a process needs memory for one.
llama.cpp's Llama architecture includes Mistral's 7B and SmolLM2.

llama.cpp rotates neighbouring elements of a head, as llama2.c does (`llama2c.halves`). Its converter writes the scaled
RoPE of Llama 3.1 as factors of the frequencies, from which the scaling is recovered here. The tokenizer is the one
that transformers makes of the file, with llama.cpp's pre-tokenization.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats.hf_config import EMBEDDING, HEAD, architecture_from_config
from nemo_steerlm.formats.llama2c import ROTATED, halves

SUFFIX = ".gguf"
_ONLY = "llama"
_OUTER = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROPE = "rope_freqs.weight"
# config.json's key -> the file's; all must be there but those of the second table
_SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip
_OPTIONS = {
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}  # fmt: skip
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# How words are cut before a byte-level BPE joins bytes, by the file's name for it.
_DIGIT_BY_DIGIT = ("smollm", "refact", "starcoder")
_THREE_DIGITS = ("llama-bpe", "llama3", "llama-v3")
_THREE_DIGITS_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


class GgufFile:
    """A GGUF file, memory-mapped; a `hf.TensorSource`.

    Attributes:
        architecture: read from the metadata.
        ends: ids that end a text or a turn.
        dtype: bfloat16 where the matrices are stored so, else float32, to which all other types are dequantised.

    Raises:
        CheckpointError: not such a file, a damaged one, one of several parts, or a model of another architecture.
        ConfigError: the package gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ConfigError(f"{path}: GGUF needs the package gguf: pip install 'nemo_steerlm[gguf]'") from None

        self.where = path
        try:
            reader = GGUFReader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{path}: no GGUF file, or a damaged one ({error})") from None
        _check_kind(fields, path)
        self._fields: dict[str, Any] = fields
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        factors = self._tensors.pop(_ROPE, None)
        if EMBEDDING not in self._tensors:
            raise CheckpointError(f"{path}: token_embd.weight is missing; a vocabulary, or an adapter, is no model")
        self.architecture = architecture_from_config(self._config(), path)
        if factors is not None:
            self.architecture = architecture_from_config(
                self._config() | {"rope_scaling": self._scaling(np.array(factors.data))}, path
            )
        self._head = self.architecture.head_size
        self._types = Counter(tensor.tensor_type.name for tensor in self._tensors.values())
        first = self._tensors.get("model.layers.0.self_attn.q_proj.weight", self._tensors[EMBEDDING])
        self.dtype = torch.bfloat16 if first.tensor_type.name == "BF16" else torch.float32
        ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        self.ends = tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def format(self) -> str:
        """The types that its tensors are stored in, the most frequent first."""
        return "GGUF " + ", ".join(f"{name} ({count} tensors)" for name, count in self._types.most_common())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of everything in the file, under Hugging Face's names where there is one."""
        return {name: tuple(map(int, reversed(t.shape))) for name, t in self._tensors.items()}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (`dim` 0) or columns (1) `start` to `stop` in fp32, rows of queries and keys in whole heads.

        Blocks of quantised numbers lie along the rows: for columns the whole tensor is dequantised.

        Raises:
            CheckpointError: a type that the package gguf does not dequantise.
        """
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data[start:stop] if dim == 0 else tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.where}: {tensor.name} is stored as {tensor.tensor_type.name}, which the package gguf does not "
                f"dequantise; take a file of another type"
            ) from None
        part = torch.from_numpy(np.array(values if dim == 0 else values[:, start:stop], np.float32))
        return halves(part, self._head, start) if dim == 0 and name.endswith(ROTATED) else part

    def tokenizer_folder(self) -> Path:
        """Write the file's tokenizer and chat template into a folder, which lasts as long as this object.

        Raises:
            ConfigError: transformers cannot make one, or its pre-tokenization is unknown.
        """
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if self._scratch is not None:
            return Path(self._scratch.name)
        get, where = self._fields.get, self.where
        try:
            theirs = AutoTokenizer.from_pretrained(where.parent, gguf_file=where.name, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - transformers raises whatever the file led to
            why = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{where}: no tokenizer can be made of it ({why}); name the original model's with tokenizer=FOLDER"
            ) from None
        state, tokens = json.loads(theirs.backend_tokenizer.to_str()), self._fields["tokenizer.ggml.tokens"]
        # transformers' classes add tokens of their own, for which the model has no row
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
        if get("tokenizer.ggml.model") == "gpt2":
            state |= _byte_level(get("tokenizer.ggml.pre"), where)
        if get("tokenizer.ggml.add_bos_token") is False:
            state["post_processor"] = None
        backend = Tokenizer.from_str(json.dumps(state))
        ids = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
        names = {f"{name}_token": tokens[id_] for name, id_ in ids.items() if id_ is not None}
        ours = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=get("tokenizer.chat_template"), **names)
        self._scratch = tempfile.TemporaryDirectory(prefix="steerlm-")
        folder = Path(self._scratch.name)
        ours.save_pretrained(folder)
        described = folder / "tokenizer_config.json"
        settings = json.loads(described.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that 4 does not know
        described.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return folder

    def _config(self) -> dict[str, Any]:
        """The file's metadata as a `config.json`, without Llama 3.1's RoPE."""
        found = {key: self._fields.get(f"{_ONLY}.{name}") for key, name in (_SIZES | _OPTIONS).items()}
        if lost := [f"{_ONLY}.{_SIZES[key]}" for key in _SIZES if found[key] is None]:
            raise CheckpointError(f"{self.where}: the key {lost[0]} is missing")
        config = {key: value for key, value in found.items() if value is not None}
        if lists := [key for key, value in config.items() if isinstance(value, list)]:
            raise CheckpointError(f"{self.where}: {lists[0]} differs from layer to layer, which is not supported")
        config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))  # 1e-5, and not the float32 next to it
        scaling = self._fields.get(f"{_ONLY}.rope.scaling.type", "none")
        if rotated := self._fields.get(f"{_ONLY}.rope.dimension_count"):
            head = config.get("head_dim") or config["hidden_size"] // max(1, config["num_attention_heads"])
            config["partial_rotary_factor"] = rotated / max(1, head)
        return config | {
            "model_type": _ONLY,
            "vocab_size": int(self._tensors[EMBEDDING].shape[-1]),
            "tie_word_embeddings": HEAD not in self._tensors,
            "rope_scaling": None if scaling == "none" else {"rope_type": scaling},
        }

    def _scaling(self, factors: np.ndarray) -> dict[str, Any]:
        """Llama 3.1's scaling for these factors `[head / 2]`, by which frequencies are divided.

        Raises:
            CheckpointError: there is none.
        """
        size, theta = self.architecture.head_size, self.architecture.rope_theta
        low, high, length, factor = 1.0, 4.0, 8192, float(factors.max())
        turns = length * theta ** (-np.arange(0, size, 2) / size) / (2 * math.pi)  # in the original context
        blend = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - blend) / factor + blend)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise CheckpointError(
                f"{self.where}: {_ROPE} is not Llama 3.1's scaling of RoPE (from {length} tokens, {low:g} to "
                f"{high:g} turns), which is the only one supported; import the original model"
            )
        return {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }  # fmt: skip


def _check_kind(fields: dict[str, Any], where: Path) -> None:
    """Refuse anything but a whole Llama model, with the kind found."""
    found = fields.get("general.architecture")
    if found != _ONLY:
        raise CheckpointError(
            f"{where}: general.architecture is {found!r}; of GGUF only {_ONLY!r} is read, import the original model"
        )
    if experts := fields.get(f"{_ONLY}.expert_count"):
        raise CheckpointError(f"{where}: a mixture of {experts} experts, which is not supported")
    if (parts := fields.get("split.count") or 1) > 1:
        raise CheckpointError(f"{where}: one of {parts} parts; join them with llama-gguf-split --merge")


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor, or the file's own where there is none."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _LAYER:
        return f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
    return _OUTER.get(name, name)


def _byte_level(name: str | None, where: Path) -> dict[str, Any]:
    """The parts of a byte-level BPE's tokenizer.json around the BPE itself."""
    from tokenizers import decoders

    parts = {"pre_tokenizer": _word_borders(name, where), "decoder": decoders.ByteLevel()}
    return {"normalizer": None, **{key: json.loads(part.__getstate__()) for key, part in parts.items()}}


def _word_borders(name: str | None, where: Path) -> Any:
    """The pre-tokenizer of a byte-level BPE.

    transformers (5.23, integrations/gguf) does not cut between digits: the `1` of `\\n\\n1.` then gets other
    neighbours than in training. Remove when it goes by `tokenizer.ggml.pre`.
    """
    from tokenizers import Regex, pre_tokenizers

    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGIT_BY_DIGIT:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name in _THREE_DIGITS:
        cut = pre_tokenizers.Split(Regex(_THREE_DIGITS_CUT), "isolated")
        return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ConfigError(
        f"{where}: tokenizer.ggml.pre is {name!r}, a way to cut words that is not known here; name the original "
        f"model's tokenizer with tokenizer=FOLDER"
    )

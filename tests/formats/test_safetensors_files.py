"""Weights in one file and in parts, and folders whose files are not as they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_steerlm.config import ParallelConfig
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import hf
from nemo_steerlm.formats.hf_config import HEAD
from nemo_steerlm.formats.safetensors_files import INDEX
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.verbs import convert
from tests.formats.helpers import all_tensors, differing, make_model, make_tokenizer, to_folder, to_hf


def test_files_in_parts(tmp_path: Path) -> None:
    make_model(tmp_path / "parts", "llama2", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    source, card = convert.open_checkpoint(tmp_path / "parts")
    parallel.initialize()
    chunks = gpt.build(card.architecture, ParallelConfig())
    hf.load(source, chunks, card.architecture)
    (tmp_path / "out").mkdir()
    hf.save(tmp_path / "out", chunks, card.architecture, torch.float32, max_file_bytes=100_000)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert max(file.stat().st_size for file in files) < 110_000
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    tensors = all_tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert differing(tmp_path / "parts", tmp_path / "out") == []


def test_a_tensor_is_read_from_the_file_its_index_names(models: dict[str, Path], tmp_path: Path) -> None:
    """Another file may hold one of the same name: what an earlier save left."""
    source = shutil.copytree(models["llama2"], tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    stale = "model.layers.0.mlp.down_proj.weight"
    parts = {"a.safetensors": [stale], "b.safetensors": [name for name in tensors if name != stale]}
    save_file({stale: tensors[stale]}, source / "a.safetensors")
    save_file({**tensors, stale: torch.zeros_like(tensors[stale])}, source / "b.safetensors")
    index = {name: file for file, names in parts.items() for name in names}
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    to_folder(source, tmp_path / "model")
    to_hf(tmp_path / "model", tmp_path / "hf")
    assert differing(models["llama2"], tmp_path / "hf") == []


def _break_files(folder: Path, case: str) -> None:
    weights = folder / "model.safetensors"
    if case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif case == "part missing":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
        weights.unlink()
    elif case == "bias in the weights":
        tensors = load_file(weights) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
        save_file(tensors, weights)
    elif case == "tensor missing":
        tensors = load_file(weights)
        del tensors["lm_head.weight"]
        save_file(tensors, weights)
    elif case == "8-bit":
        save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(weights).items()}, weights)
    elif case in ("single and index", "index without its tensor"):
        tensors = load_file(weights)
        save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, folder / "part.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
        if case == "index without its tensor":
            weights.unlink()
    elif case == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    elif case == "adapter in the weights":
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file(load_file(weights) | {name: torch.zeros(8, 64)}, weights)
    elif case == "gptq":
        save_file({n.replace("q_proj.weight", "q_proj.qweight"): t for n, t in load_file(weights).items()}, weights)
    elif case == "headless":
        save_file({n.removeprefix("model."): t for n, t in load_file(weights).items() if n != HEAD}, weights)
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case == "broken config":
        (folder / "config.json").write_text("{")
    elif case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "tokenizer of another":
        make_tokenizer(folder, words=251)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "damaged"),
        ("pickle only", "pickled weights"),
        ("part missing", "model-00001-of-00002.safetensors: missing"),
        ("bias in the weights", "does not have: model.layers.0.self_attn.q_proj.bias"),
        ("tensor missing", "1 tensors are missing: lm_head.weight"),
        ("8-bit", "stored as F8_E4M3"),
        ("single and index", "holds model.safetensors and model.safetensors.index.json, which names other files"),
        ("index without its tensor", "part.safetensors: 1 tensors that model.safetensors.index.json places there"),
        ("adapter", "an adapter (adapter_config.json), no model of its own"),
        ("adapter in the weights", "q_proj.lora_A.weight: an adapter; merge it"),
        ("gptq", "q_proj.qweight: quantised weights; dequantise"),
        ("headless", "holds embed_tokens.weight: a backbone without a head"),
        ("no config", "no config.json"),
        ("broken config", "not valid JSON"),
        ("no tokenizer", "tokenizer="),
        ("tokenizer of another", "251 tokens, but the model"),
    ],
)
def test_refuses_files(models: dict[str, Path], tmp_path: Path, case: str, message: str) -> None:
    source = shutil.copytree(models["llama2"], tmp_path / "in")
    _break_files(source, case)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        to_folder(source, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source], "nothing half-written"

"""Hugging Face Llama models against transformers itself: logits and files, at every layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyDataConfig,
    TrainerConfig,
    TrainSftConfig,
)
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import hf, model_folder
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.provenance import sha256_file
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests.distributed import run_distributed
from tests.formats.helpers import (
    SHAPES,
    all_tensors,
    differing,
    make_model,
    make_tokenizer,
    megatron_logits,
    sample_tokens,
    to_folder,
    to_hf,
)

SCALAR = {"quality": 0.65, "humor": -0.3}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": dict(tensor=2),
    "pp2": dict(pipeline=2),
    "tp2xpp2": dict(tensor=2, pipeline=2),
    "pp2+vpp2": dict(pipeline=2, virtual_pipeline=2),
}


def make_classifier(folder: Path) -> Path:
    """A random Llama with two named outputs and its tokenizer, written by transformers."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(3)
    names = {0: "quality", 1: "humor"}
    config = LlamaConfig(max_position_embeddings=64, initializer_range=0.12, id2label=names, **SHAPES["llama2"])
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file but the one that says how it was made."""
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.name != "run.json"}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_process(models: dict[str, Path], shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, tokens = models[shape], sample_tokens(shape)
    assert "language_model" in to_folder(source, tmp_path / "model")
    logits = megatron_logits(tmp_path / "model", tokens, ParallelConfig())
    expected = load_file(source.with_suffix(".logits"))["logits"]
    size = SHAPES[shape]["vocab_size"]
    torch.testing.assert_close(logits[..., :size], expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1, "logits so small that any model would pass"
    assert logits.shape[-1] % 128 == 0 and not logits[..., size:].any(), "padded rows are zero"

    to_hf(tmp_path / "model", tmp_path / "hf")
    assert differing(source, tmp_path / "hf") == []
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, expected)
    assert json.loads((tmp_path / "model" / "run.json").read_text())["verb"] == "import"
    assert json.loads((tmp_path / "hf" / "run.json").read_text())["verb"] == "export"


def convert_everywhere(folders: dict[str, str], work: str) -> dict[str, Any]:
    """In every process: import at each layout, compare logits there, export at the next layout."""
    results: dict[str, Any] = {}
    layouts = list(LAYOUTS.items())
    for shape, name in folders.items():
        source, expected = Path(name), None
        if shape in SHAPES:
            expected = load_file(source.with_suffix(".logits"))["logits"]
        for index, (title, sizes) in enumerate(layouts):
            if expected is None and title != "tp2xpp2":
                continue  # a classifier differs in its head alone, which goes from here to pp2+vpp2
            layout, (after, after_sizes) = ParallelConfig(**sizes), layouts[(index + 1) % len(layouts)]
            model, output = Path(work) / f"{shape}-{title}", Path(work) / f"{shape}-{title}-{after}"
            to_folder(source, model, layout)
            result: dict[str, Any] = {}
            if expected is not None and layout.virtual_pipeline is None:
                logits = megatron_logits(model, sample_tokens(shape), layout)[..., : expected.shape[-1]]
                result["logits"] = (logits - expected).abs().max().item()
            to_hf(model, output, ParallelConfig(**after_sizes))
            result["differing"] = differing(source, output) if parallel.is_rank_zero() else None
            result["files"] = contents(output)
            if expected is None:
                to_hf(model, output.with_name("scalar"), ParallelConfig(**after_sizes), scalar=SCALAR)
                result["scalar"] = contents(output.with_name("scalar"))
            results[f"{shape} {title} -> {after}"] = result
    return results


def test_every_layout(models: dict[str, Path], tmp_path: Path) -> None:
    folders = {shape: str(folder) for shape, folder in models.items()}
    folders["classifier"] = str(make_classifier(tmp_path / "classifier"))
    alone = {}
    for shape, folder in folders.items():
        to_folder(Path(folder), tmp_path / f"{shape}-model")
        to_hf(tmp_path / f"{shape}-model", tmp_path / f"{shape}-hf")
        alone[shape] = contents(tmp_path / f"{shape}-hf")
    to_hf(tmp_path / "classifier-model", tmp_path / "scalar-hf", scalar=SCALAR)
    results = run_distributed(convert_everywhere, 4, folders=folders, work=str(tmp_path))
    assert results["classifier tp2xpp2 -> pp2+vpp2"]["scalar"] == contents(tmp_path / "scalar-hf")
    assert len(results) == len(SHAPES) * len(LAYOUTS) + 1
    for title, result in results.items():
        assert result["differing"] == [], title
        assert result["files"] == alone[title.split()[0]], title
        assert result.get("logits", 0.0) < 1e-5, title


def test_an_export_is_for_all_to_read_and_to_generate_with(models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert "one output" not in to_folder(models["llama2"], tmp_path / "model")
    before = os.umask(0o027)
    try:
        to_hf(tmp_path / "model", tmp_path / "hf")
    finally:
        os.umask(before)
    assert {f"{file.name} {file.stat().st_mode & 0o777:o}" for file in (tmp_path / "hf").iterdir()} == {
        f"{file.name} 640" for file in (tmp_path / "hf").iterdir()
    }
    assert set(AutoTokenizer.from_pretrained(tmp_path / "hf")("w1 w2")) == {"input_ids", "attention_mask"}


def test_ids_beyond_the_true_vocabulary_are_refused_everywhere(models: dict[str, Path], tmp_path: Path) -> None:
    """250 rows of the model are padded to 256; the tokenizer gets 251 tokens."""
    from nemo_steerlm.models.policy import AttributeConditionedGPT
    from nemo_steerlm.train.start import start_model

    to_folder(models["llama2"], tmp_path / "model")
    card = model_folder.read(tmp_path / "model")
    source = shutil.copytree(models["llama2"], tmp_path / "in")
    make_tokenizer(source, words=251)
    chunks = gpt.build(card.architecture, ParallelConfig())
    model_folder.write(tmp_path / "bad", card, load_tokenizer(source), chunks)

    def train(init: Path | None) -> None:
        shape, tokenizer = (None, None) if init else (card.architecture, str(source))
        start = ModelConfig(init=str(init) if init else None, architecture=shape, tokenizer=tokenizer)
        config = TrainSftConfig(
            output="unused", data=PolicyDataConfig(train="unused"), model=start, optimizer=OptimizerConfig(lr=1e-3),
            trainer=TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
        )  # fmt: skip
        start_model(AttributeConditionedGPT, config, AttributeSchema.load("helpsteer2"))

    for use in (
        lambda: to_folder(source, tmp_path / "out"),
        lambda: to_hf(tmp_path / "bad", tmp_path / "out"),
        lambda: AttributeConditionedGPT.from_pretrained(tmp_path / "bad"),
        lambda: train(source),
        lambda: train(tmp_path / "bad"),
        lambda: train(None),
    ):
        with pytest.raises(CheckpointError, match="the tokenizer has 251 tokens, but the model .* has 250"):
            use()
    assert not (tmp_path / "out").exists()


def test_stored_type_is_kept(tmp_path: Path) -> None:
    make_model(tmp_path / "f32", "llama3")
    halves = {name: tensor.bfloat16() for name, tensor in all_tensors(tmp_path / "f32").items()}
    save_file(halves, tmp_path / "f32" / "model.safetensors")
    to_folder(tmp_path / "f32", tmp_path / "model")
    to_hf(tmp_path / "model", tmp_path / "same")
    to_hf(tmp_path / "model", tmp_path / "wide", dtype="float32")
    assert differing(tmp_path / "f32", tmp_path / "same") == []
    assert json.loads((tmp_path / "same" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = all_tensors(tmp_path / "wide")
    assert all(torch.equal(wide[name], halves[name].float()) for name in halves) and len(wide) == len(halves)


def test_policy_stays_a_policy(models: dict[str, Path], tmp_path: Path) -> None:
    to_folder(models["llama3"], tmp_path / "model")
    schema = AttributeSchema.load("helpsteer2")
    card = model_folder.read(tmp_path / "model")
    chunks = gpt.build(card.architecture, ParallelConfig())
    model_folder.load_weights(tmp_path / "model", chunks)
    policy = model_folder.ModelCard(kind="policy", architecture=card.architecture, schema=schema)
    model_folder.write(tmp_path / "policy", policy, model_folder.read_tokenizer(tmp_path / "model"), chunks)
    to_hf(tmp_path / "policy", tmp_path / "hf")
    to_folder(tmp_path / "hf", tmp_path / "again")
    assert model_folder.read(tmp_path / "again") == model_folder.read(tmp_path / "policy")


class _Renamed:
    """A chunk under the names it has when Transformer Engine builds it."""

    _NAMES = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }

    def __init__(self, chunk: Any) -> None:
        self.decoder, self._chunk = chunk.decoder, chunk

    def named_parameters(self) -> Any:
        for name, parameter in self._chunk.named_parameters():
            for plain, fused in self._NAMES.items():
                name = name.replace(plain, fused)
            yield name, parameter


def test_names_of_transformer_engine(models: dict[str, Path], tmp_path: Path) -> None:
    source, card = convert.open_checkpoint(models["llama2"])
    parallel.initialize()
    chunks: list[Any] = [_Renamed(chunk) for chunk in gpt.build(card.architecture, ParallelConfig())]
    assert any("layer_norm_weight" in name for name, _ in chunks[0].named_parameters())
    hf.load(source, chunks, card.architecture)
    hf.save(tmp_path, chunks, card.architecture, torch.float32)
    assert differing(models["llama2"], tmp_path) == []


def test_harmless_leftovers_are_ignored(models: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(models["llama3"], tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, source / "model.safetensors")
    to_folder(source, tmp_path / "model")
    to_hf(tmp_path / "model", tmp_path / "hf")
    assert differing(models["llama3"], tmp_path / "hf") == []


def test_places_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is no earlier result"):
        to_folder(models["llama3"], tmp_path / "mine")
    with pytest.raises(CheckpointError, match="no such folder"):
        to_folder(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such model folder"):
        to_hf(tmp_path / "absent", tmp_path / "out")
    to_folder(models["llama3"], tmp_path / "model")
    with pytest.raises(CheckpointError, match="already a model folder"):
        to_folder(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        to_hf(tmp_path / "model", tmp_path / "out", dtype="bfloat")
    with pytest.raises(ConfigError, match="is no earlier result"):
        to_hf(tmp_path / "model", tmp_path / "mine")
    to_hf(tmp_path / "model", tmp_path / "hf")
    to_hf(tmp_path / "model", tmp_path / "hf")  # an earlier result is replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mine", "model"]

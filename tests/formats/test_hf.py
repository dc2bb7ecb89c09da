"""Hugging Face Llama models against transformers itself: logits, files and refusals, at every layout."""

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
    Architecture,
    ExportConfig,
    ImportConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyDataConfig,
    RopeScaling,
    TrainerConfig,
    TrainSftConfig,
)
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import hf, hf_config, model_folder
from nemo_steerlm.formats.safetensors_files import INDEX
from nemo_steerlm.megatron import gpt, inference, parallel
from nemo_steerlm.provenance import sha256_file
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests.distributed import run_distributed
from tests.megatron.reference import forward

SHAPES: dict[str, dict[str, Any]] = {
    # Llama 2: as many key heads as query heads, a head of its own, a vocabulary that needs padding (250 -> 256)
    "llama2": dict(
        vocab_size=250, hidden_size=64, intermediate_size=88, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=False, rms_norm_eps=1e-6,
    ),
    # Llama 3.1 and 3.2: grouped queries, tied, scaled RoPE whose blend lies inside the tested length, head_dim apart
    # from hidden / heads, and so few words that the second tensor-parallel rank holds padding only (60 -> 128)
    "llama3": dict(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters=dict(
            rope_theta=500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
}  # fmt: skip
SCALAR = {"quality": 0.65, "humor": -0.3}
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": dict(tensor=2),
    "pp2": dict(pipeline=2),
    "tp2xpp2": dict(tensor=2, pipeline=2),
    "pp2+vpp2": dict(pipeline=2, virtual_pipeline=2),
}


def make_model(folder: Path, shape: str, **save: Any) -> Any:
    """A random Llama with its tokenizer, written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, initializer_range=0.12, **SHAPES[shape])).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # not all ones, or exchanging two of them would go unseen
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, **save)
    make_tokenizer(folder)
    return model


def make_tokenizer(folder: Path, words: int = 60) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_classifier(folder: Path) -> Path:
    """A random Llama with two named outputs and its tokenizer, written by transformers."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(3)
    names = {0: "quality", 1: "humor"}
    config = LlamaConfig(max_position_embeddings=64, initializer_range=0.12, id2label=names, **SHAPES["llama2"])
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def sample_tokens(shape: str) -> torch.Tensor:
    return torch.randint(0, SHAPES[shape]["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(5))


def to_folder(source: Path, output: Path, layout: ParallelConfig | None = None) -> str:
    layout = layout or ParallelConfig()
    return convert.import_main(ImportConfig(input=str(source), output=str(output), parallel=layout))


def to_hf(folder: Path, output: Path, layout: ParallelConfig | None = None, **settings: Any) -> str:
    layout = layout or ParallelConfig()
    return convert.export_main(ExportConfig(checkpoint=str(folder), output=str(output), parallel=layout, **settings))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file but the one that says how it was made."""
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.name != "run.json"}


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors that are not the same bits in both folders."""
    left, right = all_tensors(a), all_tensors(b)
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )


@torch.no_grad()
def megatron_logits(folder: Path, tokens: torch.Tensor, layout: ParallelConfig) -> torch.Tensor:
    """Logits `[batch, seq, padded vocabulary]` of a model folder at a layout, on every rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    parallel.initialize(layout)
    architecture = model_folder.read(folder).architecture
    chunks = gpt.build(architecture, layout)
    model_folder.load_weights(folder, chunks)
    output = forward(chunks[0].eval(), tokens)
    logits = torch.empty(*tokens.shape, gpt.padded_vocabulary(architecture))
    if parallel_state.is_pipeline_last_stage():
        logits = gather_from_tensor_model_parallel_region(output).contiguous()
    return inference.broadcast_from_last_stage(logits)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each shape as a Hugging Face folder, with the logits of transformers beside it."""
    folders = {}
    for shape in SHAPES:
        folders[shape] = tmp_path_factory.mktemp("hf") / shape
        model = make_model(folders[shape], shape)
        with torch.no_grad():
            save_file({"logits": model(sample_tokens(shape)).logits}, folders[shape].with_suffix(".logits"))
    return folders


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
        start = ModelConfig(init=init and str(init), architecture=shape, tokenizer=tokenizer)
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


def test_config_round_trip() -> None:
    from transformers import LlamaConfig

    architecture = Architecture(
        num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, num_query_groups=3, head_dim=10,
        vocab_size=77, max_position_embeddings=99, norm_epsilon=3e-6, rope_theta=123456.0, tie_word_embeddings=True,
        rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=512), init_std=0.03,
    )  # fmt: skip
    data = hf_config.config_from_architecture(architecture, "bfloat16")
    assert hf_config.architecture_from_config(data, "here") == architecture
    # transformers reads it, and what transformers writes in its own notation is read back as the same
    theirs = LlamaConfig.from_dict(data)
    assert theirs.num_key_value_heads == 3 and str(theirs.dtype).endswith("bfloat16")
    assert hf_config.architecture_from_config(json.loads(theirs.to_json_string(use_diff=False)), "") == architecture
    # keys that are left out mean the same as in transformers
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    short = {"model_type": "llama", **{key: data[key] for key in sizes}}
    full = json.loads(LlamaConfig.from_dict(short).to_json_string(use_diff=False))
    assert hf_config.architecture_from_config(short, "") == hf_config.architecture_from_config(full, "")


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "gemma"}, "model_type is 'gemma'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "quantised, by name": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq)"),
    "token classifier": ({"architectures": ["LlamaForTokenClassification"]}, "Classification, a token classifier;"),
    "headless": ({"architectures": ["LlamaModel"]}, "architectures names LlamaModel, a backbone without a head"),
    "reward model": ({"architectures": ["LlamaForRewardModel"]}, "RewardModel, a model of another task"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    "linear, old notation": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    "half a llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
    "no sizes": ({"hidden_size": None}, "hidden_size is None"),
    "shapes of another": ({"intermediate_size": 96}, "gate_proj.weight has shape [88, 64], its configuration asks"),
    "more layers": ({"num_hidden_layers": 5}, "9 tensors are missing: model.layers.4.input_layernorm"),
    "fewer layers": ({"num_hidden_layers": 3}, "9 tensors that a llama model does not have: model.layers.3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_config(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    change, message = BAD_CONFIGS[case]
    source = shutil.copytree(models["llama2"], tmp_path / "in")
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | change))
    with pytest.raises(CheckpointError) as caught:
        to_folder(source, tmp_path / "out")
    assert message in str(caught.value) and str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source], "nothing half-written"


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
        save_file({n.removeprefix("model."): t for n, t in load_file(weights).items() if n != hf.HEAD}, weights)
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

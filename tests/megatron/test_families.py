"""Every family against transformers on a random model: logits, gradients, generation and files, at every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_steerlm.config import Architecture, ParallelConfig, families
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import hf, hf_config, model_folder
from nemo_steerlm.formats.safetensors_files import SafetensorsFolder
from nemo_steerlm.megatron import generation, gpt, parallel
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests.distributed import run_distributed
from tests.formats.helpers import differing, make_tokenizer, megatron_logits, to_folder, to_hf
from tests.models.helpers import make_batches, make_model, random_items

VOCABULARY, NEW = 500, 8
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.12, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
TRAITS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=64, head_dim=16, rms_norm_eps=1e-5),  # a window as wide as the longest text
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16),
    "nemotron": {},  # rotates half of each head
}
LAYOUTS: dict[str, dict[str, Any]] = {"tp2": dict(tensor=2), "pp2": dict(pipeline=2)}
TRAINING: dict[str, dict[str, Any]] = {"tp2+sp": dict(tensor=2, sequence=True), "pp2": dict(pipeline=2)}


def make_reference(family: str) -> Any:
    """A random model of transformers whose norms and biases are not what training starts with."""
    import transformers

    torch.manual_seed(3)
    name = families.FAMILIES[family].hf_class
    settings = getattr(transformers, name.replace("ForCausalLM", "Config"))(**{**SHAPE, **TRAITS[family]})
    model = getattr(transformers, name)(settings).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    return model


def prompts() -> list[list[int]]:
    """Ragged prompts."""
    random = torch.Generator().manual_seed(7)
    return [torch.randint(2, VOCABULARY, (length,), generator=random).tolist() for length in (3, 17, 9)]


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))


def reference_loss(model: Any) -> torch.Tensor:
    """Mean negative log probability of the policy's masked tokens, item by item."""
    total, count = torch.tensor(0.0), 0
    for item in random_items("policy", 8):
        ids, mask = torch.tensor(item["tokens"]), torch.tensor(item["loss_mask"])[1:]
        logits = model(ids[None]).logits[0, :-1][mask]
        total = total + torch.nn.functional.cross_entropy(logits, ids[1:][mask], reduction="sum")
        count += int(mask.sum())
    return total / count


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as a Hugging Face folder; beside it what transformers computes (`.expected`, `.gradients/`)."""
    folders = {}
    for family in TRAITS:
        folder = folders[family] = tmp_path_factory.mktemp("families") / family
        model = make_reference(family)
        model.save_pretrained(folder)
        make_tokenizer(folder, words=VOCABULARY - 10)  # transformers gives Qwen2's one more
        without_token = list(range(load_tokenizer(folder).vocab_size, VOCABULARY))
        with torch.no_grad():
            expected = {"logits": model(tokens()).logits}
            for index, prompt in enumerate(prompts()):
                given = torch.tensor([prompt])
                new = model.generate(
                    given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0,
                    suppress_tokens=without_token,
                )  # fmt: skip
                expected[f"generated {index}"] = new[0, len(prompt) :]
        loss = reference_loss(model)
        loss.backward()
        expected["loss"] = loss.detach()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        save_file(gradients, folder.with_suffix(".gradients"))
        save_file(expected, folder.with_suffix(".expected"))
    return folders


def compare(source: Path, work: Path, title: str, layout: ParallelConfig) -> dict[str, Any]:
    """Import at a layout; logits and generation there, and what an export has changed."""
    folder, expected = work / f"{source.name}-{title}", load_file(source.with_suffix(".expected"))
    to_folder(source, folder, layout)
    logits = megatron_logits(folder, tokens(), layout)[..., :VOCABULARY]
    card, tokenizer = model_folder.read(folder), model_folder.read_tokenizer(folder)
    chunks = gpt.build(card.architecture, layout)
    model_folder.load_weights(folder, chunks)
    settings = SamplingSettings(max_new_tokens=NEW)
    found = generation.generate(chunks[0], tokenizer, prompts(), settings, vocab_size=VOCABULARY)
    generated = [expected[f"generated {index}"].tolist() for index in range(len(found))]
    generated = [ids[: ids.index(1)] if 1 in ids else ids for ids in generated]  # w1 ends a text
    to_hf(folder, folder.with_suffix(".hf"), layout)
    return {
        "logits": ((logits - expected["logits"]).abs() / (1 + expected["logits"].abs())).max().item(),
        "generated": [generation.tokens for generation in found] == generated,
        "tokens": sum(map(len, generated)),
        "differing": differing(source, folder.with_suffix(".hf")) if parallel.is_rank_zero() else None,
    }


def compare_training(source: Path, work: Path, title: str, layout: ParallelConfig) -> dict[str, Any]:
    """Loss and gradients of one step; gradients are compared under the names of transformers."""
    data = hf_config.read_config(source / "config.json")
    architecture = hf_config.architecture_from_config(data, source)
    parallel.initialize(layout)
    model = make_model("policy", layout, architecture=architecture)
    model.build()
    hf.load(SafetensorsFolder(source), model.chunks, architecture)
    model.configure_model()
    model.configure_optimizers()  # wires the gradient's scale
    for wrapped in model._wrapped[0]:
        wrapped.zero_grad_buffer()
    items = random_items("policy", 8)
    kept = model.run(make_batches("policy", items, steps=1, micro_batch_size=2, parallel=layout)[0], False)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.copy_(parameter.main_grad)
    output = work / f"{source.name}-{title}-gradients"
    if parallel.is_rank_zero():
        output.mkdir()
    parallel.barrier()
    hf.save(output, model.chunks, architecture, torch.float32)
    parallel.barrier()
    result: dict[str, Any] = {}
    if kept:  # the last stage knows the loss
        loss = sum(float(k["sum"]) for k in kept) / sum(float(k["count"]) for k in kept)
        result["loss"] = abs(loss - float(load_file(source.with_suffix(".expected"))["loss"]))
    found, expected = load_file(output / "model.safetensors"), load_file(source.with_suffix(".gradients"))
    assert found.keys() == expected.keys()
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    result["gradients"] = {name: (found[name] - expected[name]).abs().max().item() / scale for name in expected}
    return result


def compare_everywhere(folders: dict[str, str], work: str) -> dict[str, Any]:
    """In both processes: every family at every layout of two."""
    results: dict[str, Any] = {}
    for family, folder in folders.items():
        for title, sizes in LAYOUTS.items():
            results[f"{family} {title}"] = compare(Path(folder), Path(work), title, ParallelConfig(**sizes))
        # norms of heads are summed over ranks in another way where there is no sequence parallelism
        for title, sizes in {**TRAINING, **(LAYOUTS if family == "qwen3" else {})}.items():
            result = compare_training(Path(folder), Path(work), title, ParallelConfig(**sizes))
            results[f"{family} {title} training"] = result
    return results


def check(title: str, result: dict[str, Any]) -> None:
    """What `compare` and `compare_training` found is nothing."""
    if "gradients" in result:
        assert result.get("loss", 0.0) < 1e-5, title
        wrong = {name: error for name, error in result["gradients"].items() if error > 1e-5}
        assert wrong == {}, title
    else:
        assert result["logits"] < 1e-5 and result["differing"] == [] and result["generated"], (title, result)
        assert result["tokens"] > 2 * NEW


@pytest.mark.parametrize("family", TRAITS)
def test_one_process(references: dict[str, Path], tmp_path: Path, family: str) -> None:
    source = references[family]
    check(family, compare(source, tmp_path, "tp1", ParallelConfig()))
    check(family, compare_training(source, tmp_path, "tp1", ParallelConfig()))
    assert load_file(source.with_suffix(".expected"))["logits"].abs().max() > 1, "any model would pass"
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-tp1.hf").eval()
    assert type(exported).__name__ == families.FAMILIES[family].hf_class
    with torch.no_grad():
        assert torch.equal(exported(tokens()).logits, load_file(source.with_suffix(".expected"))["logits"])


def test_every_layout(references: dict[str, Path], tmp_path: Path) -> None:
    folders = {family: str(folder) for family, folder in references.items()}
    results = run_distributed(compare_everywhere, 2, folders=folders, work=str(tmp_path))
    assert len(results) == len(TRAITS) * (len(LAYOUTS) + len(TRAINING)) + 1
    for title, result in results.items():
        check(title, result)


def test_every_family_is_tested_and_can_be_chosen() -> None:
    assert tuple(TRAITS) == tuple(families.FAMILIES)


@pytest.mark.parametrize("family", TRAITS)
def test_config_round_trip(family: str) -> None:
    import transformers

    theirs = getattr(transformers, families.FAMILIES[family].hf_class.replace("ForCausalLM", "Config"))
    architecture = Architecture(
        family=family, num_layers=3, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, num_query_groups=3,
        head_dim=10, vocab_size=77, max_position_embeddings=99, norm_epsilon=3e-6, rope_theta=123456.0,
        rotary_percent=0.25 if families.FAMILIES[family].partial_rotary else 1.0, tie_word_embeddings=True,
        init_std=0.03,
    )  # fmt: skip
    data = hf_config.config_from_architecture(architecture, "bfloat16")
    assert hf_config.architecture_from_config(data, "here") == architecture
    # transformers reads it, and what transformers writes in its own notation is read back as the same
    full = json.loads(theirs.from_dict(data).to_json_string(use_diff=False))
    assert hf_config.architecture_from_config(full, "") == architecture
    # keys that are left out mean the same as in transformers
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    short = {"model_type": family, **{key: data[key] for key in sizes}, "num_attention_heads": 64}
    short["hidden_size"] = 64 * 128
    full = json.loads(theirs.from_dict(short).to_json_string(use_diff=False))
    if family == "mistral":  # whose window is then too narrow
        with pytest.raises(CheckpointError, match="sliding_window is 4096, less than max_position_embeddings 131072"):
            hf_config.architecture_from_config(short, "")
        short["sliding_window"] = full["sliding_window"] = None
    assert hf_config.architecture_from_config(short, "") == hf_config.architecture_from_config(full, "")


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a narrow window": ("mistral", {"sliding_window": 63}, "set max_position_embeddings to 63"),
    "Qwen2's window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
    "Qwen3's bias": ("qwen3", {"attention_bias": True}, "attention_bias is True; only False"),
    "Nemotron's bias": ("nemotron", {"mlp_bias": True}, "mlp_bias is True; only False"),
    "a gated Nemotron": ("nemotron", {"hidden_act": "silu"}, "hidden_act is 'silu'; only 'relu2'"),
    "a partial Qwen3": ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
    "Mixtral": ("mistral", {"model_type": "mixtral"}, "model_type is 'mixtral'; expected one of llama, mistral"),
    "Qwen3 with experts": ("qwen3", {"model_type": "qwen3_moe"}, "mixtures of experts and multimodal models"),
    "Qwen2 as Llama": ("qwen2", {"model_type": "llama"}, "6 tensors that a llama model does not have: model.layers.0"),
    "Llama as Qwen2": ("llama", {"model_type": "qwen2"}, "6 tensors are missing: model.layers.0.self_attn.q_proj.b"),
    "Llama as Qwen3": ("llama", {"model_type": "qwen3", "head_dim": 12}, "4 tensors are missing: model.layers.0.self"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_config(references: dict[str, Path], tmp_path: Path, case: str) -> None:
    family, change, message = BAD_CONFIGS[case]
    source = shutil.copytree(references[family], tmp_path / "in")
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | change))
    with pytest.raises(CheckpointError) as caught:
        source_of_weights, card = convert.open_checkpoint(source)
        hf.check_tensors(source_of_weights, card.architecture)
    assert message in str(caught.value) and str(source) in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_family_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="family=gemma: unknown; expected one of llama, mistral"):
        families.family_of(Architecture(family="gemma"))
    with pytest.raises(ConfigError, match=r"rotary_percent=0\.5: qwen3 rotates whole heads"):
        families.family_of(Architecture(family="qwen3", rotary_percent=0.5))

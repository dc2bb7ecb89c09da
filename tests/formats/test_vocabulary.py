"""Attribute tokens: a language model imported with one for every value, and trained on them alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config import (
    Architecture,
    AttributesConfig,
    ImportConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from nemo_steerlm.config.prompt import AttributeOptions
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.formats.hf_config import EMBEDDING
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.formats.safetensors_files import SafetensorsFolder
from nemo_steerlm.formats.vocabulary import MoreRows
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests.distributed import run_distributed
from tests.formats.helpers import SHAPES, all_tensors, differing, make_model, megatron_logits, sample_tokens, to_hf
from tests.tokenizers import sentencepiece_model
from tests.verbs.helpers import make_world, policy_config, weights_of

MINE: dict[str, dict[str, Any]] = {"quality": {"low": 0, "high": 4}, "humor": {"low": -1, "high": 1}}
TOKENS = [f"quality:{n}" for n in range(5)] + [f"humor:{n}" for n in (-1, 0, 1)]


def import_(source: Path, output: Path, tokenizer: Path | None = None) -> str:
    mine = AttributesConfig(schema={name: AttributeOptions(**values) for name, values in MINE.items()})
    file = None if tokenizer is None else str(tokenizer)
    return convert.import_main(ImportConfig(input=str(source), output=str(output), tokenizer=file, attributes=mine))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_value_gets_a_token_and_a_row(tmp_path: Path, shape: str) -> None:
    """Where the vocabulary ends with the tokenizer (llama3) and where it has rows that no token has (llama2)."""
    transformers = pytest.importorskip("transformers")
    theirs = make_model(tmp_path / "theirs", shape)
    import_(tmp_path / "theirs", tmp_path / "base")
    tokenizer, size = model_folder.read_tokenizer(tmp_path / "base"), SHAPES[shape]["vocab_size"]
    assert [tokenizer.token_id(token) for token in TOKENS] == list(range(60, 68))
    label = AttributeSchema.load(MINE).format({"quality": 4, "humor": -1})
    assert tokenizer.encode(label)[::2] == [tokenizer.token_id("quality:4"), tokenizer.token_id("humor:-1")]

    to_hf(tmp_path / "base", tmp_path / "back")
    before, after = all_tensors(tmp_path / "theirs"), all_tensors(tmp_path / "back")
    for name, tensor in after.items():
        if tensor.shape[0] == max(size, 68) and tensor.dim() == 2 and "layers" not in name:  # embedding and projection
            assert torch.equal(tensor[:60], before[name][:60]) and torch.equal(tensor[68:], before[name][68:])
            torch.testing.assert_close(tensor[60:68], before[name][:60].mean(0).expand(8, -1))
        else:
            assert torch.equal(tensor, before[name])

    tokens = sample_tokens(shape) % 60
    with torch.no_grad():
        expected = theirs(tokens).logits[..., :60]
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits
    torch.testing.assert_close(megatron_logits(tmp_path / "base", tokens, ParallelConfig())[..., :60], expected)
    torch.testing.assert_close(again[..., :60], expected)


def test_parts_of_the_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    make_model(tmp_path, "llama2")
    source = MoreRows(SafetensorsFolder(tmp_path), first=246, stop=254)  # of 250
    whole = source.read(EMBEDDING)
    assert whole.shape == source.shapes()[EMBEDDING] == (254, 64)
    for start, stop in ((0, 128), (128, 254), (200, 247), (247, 250), (250, 254)):
        assert torch.equal(source.read(EMBEDDING, 0, start, stop), whole[start:stop])


def test_a_second_import_adds_nothing(tmp_path: Path) -> None:
    make_model(tmp_path / "theirs", "llama3")
    import_(tmp_path / "theirs", tmp_path / "base")
    to_hf(tmp_path / "base", tmp_path / "back")
    import_(tmp_path / "back", tmp_path / "again")
    to_hf(tmp_path / "again", tmp_path / "back again")
    assert differing(tmp_path / "back", tmp_path / "back again") == []
    tokenizers = [model_folder.read_tokenizer(tmp_path / name) for name in ("base", "again")]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_a_tokenizer_without_tokenizer_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES["llama2"], "vocab_size", 400)
    make_model(tmp_path / "theirs", "llama2")
    file = sentencepiece_model(tmp_path)
    with pytest.raises(ConfigError, match="needs a tokenizer.json; save the tokenizer with transformers first"):
        import_(tmp_path / "theirs", tmp_path / "base", file)


def test_attributes_are_not_for_what_has_its_own(tmp_path: Path) -> None:
    train_rows(str(tmp_path), steps=1)
    to_hf(tmp_path / "policy/model", tmp_path / "hf")
    with pytest.raises(ConfigError, match="is a policy, which has attributes already; leave attributes out"):
        import_(tmp_path / "hf", tmp_path / "again")


def train_rows(folder: str, tensor: int = 1, steps: int = 3) -> None:
    """A policy trained for a step, and the embeddings of its attribute tokens alone for some."""
    from nemo_steerlm.verbs import train_sft

    world, layout = Path(folder), ParallelConfig(tensor=tensor)
    if tensor == 1:
        make_world(world)
        first = policy_config(world, steps=1)
        architecture = first.model.architecture
        assert architecture is not None
        first.model.architecture = dataclasses.replace(architecture, hidden_dropout=0.0, attention_dropout=0.0)
        train_sft.train(first)
    start = ModelConfig(init=str(world / "policy/model"), freeze="trunk")
    rate = OptimizerConfig(lr=1e-2, warmup_steps=1)
    config = policy_config(world, f"rows-{tensor}", steps=steps, model=start, optimizer=rate, parallel=layout)
    config.trainer.devices = tensor
    train_sft.train(config)


def test_the_rows_of_attribute_tokens_are_trained_alone(tmp_path: Path) -> None:
    train_rows(str(tmp_path))
    run_distributed(train_rows, 2, folder=str(tmp_path), tensor=2)
    before, after, cut = (weights_of(tmp_path / name / "model") for name in ("policy", "rows-1", "rows-2"))
    tokenizer = model_folder.read_tokenizer(tmp_path / "policy/model")
    named = [tokenizer.token_id(token) for token in AttributeSchema.load("synthetic").tokens]
    tokens = [token for token in named if token is not None]
    [embedding] = [name for name, one in after.items() if torch.is_tensor(one) and not torch.equal(one, before[name])]
    moved = (after[embedding] != before[embedding]).any(1).nonzero().flatten().tolist()
    assert "word_embeddings" in embedding and set(moved) <= set(tokens) and len(moved) > len(tokens) / 2
    torch.testing.assert_close(cut[embedding], after[embedding], rtol=0, atol=1e-3)
    assert torch.equal(cut[embedding][: min(tokens)], before[embedding][: min(tokens)])


def test_a_tokenizer_that_splits_a_value_is_refused(tmp_path: Path) -> None:
    from nemo_steerlm.verbs import train_sft

    make_world(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    shape = Architecture(vocab_size=tokenizer.vocab_size, num_layers=1, hidden_size=32, num_attention_heads=4)
    parallel.initialize(ParallelConfig())
    card = ModelCard(kind="language_model", architecture=shape)
    model_folder.write(tmp_path / "base", card, tokenizer, gpt.build(shape, ParallelConfig()))
    start = ModelConfig(init=str(tmp_path / "base"), freeze="trunk")
    wider = AttributesConfig(preset="synthetic", schema={"quality": AttributeOptions(high=6)})
    with pytest.raises(ConfigError, match=r"splits quality:5 \(2 of \d+\); give the same attributes= to import"):
        train_sft.train(policy_config(tmp_path, "rows", model=start, attributes=wider))

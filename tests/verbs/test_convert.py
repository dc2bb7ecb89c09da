"""What `import` and `export` are told of a regressor's outputs, and what a classifier cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_steerlm import config as configs
from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.tokenizer import load_tokenizer
from nemo_steerlm.verbs import convert
from tests.formats.classifiers import (
    SCHEMA,
    export,
    import_,
    make_classifier,
    make_regressor,
    make_tokenizer,
    ours,
    stock,
)


def test_a_scalar_is_the_weighted_sum(tmp_path: Path) -> None:
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"))
    assert "one output" not in export(folder, tmp_path / "hf", scalar={"quality": 0.65, "verbosity": -0.4})
    expected = ours(folder).double() @ torch.tensor([[0.65], [0.0], [-0.4]], dtype=torch.float64)
    assert expected.std() > 0.05
    torch.testing.assert_close(stock(tmp_path / "hf"), expected.float(), rtol=0, atol=1e-5)
    import_(tmp_path / "hf", tmp_path / "again")
    assert model_folder.read(tmp_path / "again").schema == AttributeSchema([Attribute("reward", -2, 3)])
    torch.testing.assert_close(ours(tmp_path / "again"), expected.float(), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="scalar.humour: no such attribute; did you mean 'humor'"):
        export(folder, tmp_path / "no", scalar={"humour": 1.0})
    with pytest.raises(ConfigError, match="scalar: every weight is zero"):
        export(folder, tmp_path / "no", scalar={"humor": 0.0})
    assert not (tmp_path / "no").exists()


def test_a_scalar_weighs_outputs_only(tmp_path: Path) -> None:
    make_classifier(tmp_path / "theirs", id2label=dict(enumerate(SCHEMA.names)))
    with pytest.raises(ConfigError, match="scalar weighs a regressor's attributes"):
        parallel.initialize(configs.ParallelConfig())
        architecture = configs.Architecture(vocab_size=403)
        chunks = gpt.build(architecture, configs.ParallelConfig())
        model_folder.write(
            tmp_path / "lm", ModelCard(kind="language_model", architecture=architecture),
            load_tokenizer(tmp_path / "theirs"), chunks,
        )  # fmt: skip
        export(tmp_path / "lm", tmp_path / "hf", scalar={"quality": 1.0})


def test_a_correction_travels_with_the_values_it_corrects(tmp_path: Path) -> None:
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"))
    raw = ours(folder)
    calibration = Calibration("linear", {"humor": {"slope": 0.5, "intercept": 1.0}}, {"rows": 3})
    calibration.write(folder)
    corrected = raw * torch.tensor([1.0, 0.5, 1.0]) + torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(ours(folder), corrected)
    assert "before the stored linear calibration: apply calibration.json" in export(folder, tmp_path / "hf")
    assert Calibration.read(tmp_path / "hf", SCHEMA) == calibration
    torch.testing.assert_close(stock(tmp_path / "hf"), raw, rtol=0, atol=1e-5)
    import_(tmp_path / "hf", tmp_path / "again")
    torch.testing.assert_close(ours(tmp_path / "again"), corrected)
    assert "the sum is of raw values" in export(folder, tmp_path / "sum", scalar={"humor": 1.0})
    assert not (tmp_path / "sum" / "calibration.json").exists()


def test_names_are_given_where_there_are_none(tmp_path: Path) -> None:
    make_classifier(tmp_path / "theirs", num_labels=2)
    with pytest.raises(ConfigError, match="2 outputs have no names; name them with attributes="):
        import_(tmp_path / "theirs", tmp_path / "model")
    with pytest.raises(ConfigError, match="3 names .* but .* has 2 outputs"):
        import_(tmp_path / "theirs", tmp_path / "model", ("a", "b", "c"))
    template = configs.TemplateConfig(label_start="<value>")
    import_(tmp_path / "theirs", tmp_path / "model", ("chosen", "liked"), template=template)
    card = model_folder.read(tmp_path / "model")
    assert card.schema is not None and card.schema.names == ("chosen", "liked")
    assert card.template.label_start == "<value>"

    export(tmp_path / "model", tmp_path / "hf")
    with pytest.raises(ConfigError, match="are chosen, liked"):
        import_(tmp_path / "hf", tmp_path / "other", ("liked", "chosen"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["id2label"] = {"0": "liked", "1": "chosen"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="id2label names liked, chosen, but the key 'steerlm' chosen, liked"):
        import_(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize(("trait", "value"), [("head", "distribution"), ("pooling", "mean")])
def test_what_is_not_linear_in_the_last_token_is_refused(tmp_path: Path, trait: str, value: str) -> None:
    card = SimpleNamespace(kind="regressor", **{trait: value})
    with pytest.raises(CheckpointError, match=f"a regressor with {trait}={value} has no counterpart"):
        convert._check_expressible(tmp_path, card)  # type: ignore[arg-type]

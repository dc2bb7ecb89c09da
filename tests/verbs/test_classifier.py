"""Trainings that begin with a sequence classifier or a regressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_steerlm import config as configs
from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.errors import CheckpointError
from nemo_steerlm.formats import model_folder
from nemo_steerlm.megatron import gpt, parallel
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.train.start import start_model
from tests.formats.classifiers import SCHEMA, export, import_, make_classifier, make_regressor, make_tokenizer
from tests.formats.helpers import all_tensors


def _start(cls: type, init: Path, names: tuple[str, ...]) -> Any:
    kinds: tuple[Any, Any, Any] = (configs.TrainSftConfig, configs.PolicyDataConfig, configs.ModelConfig)
    if cls is AttributeRegressor:
        kinds = configs.TrainRegressorConfig, configs.DataConfig, configs.RegressorModelConfig
    config = kinds[0](
        output="unused",
        data=kinds[1](train="unused"),
        model=kinds[2](init=str(init)),
        optimizer=configs.OptimizerConfig(lr=1e-3),
        trainer=configs.TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
        template=configs.TemplateConfig(label_start="<value>"),
    )
    parallel.initialize(config.parallel, config.seed)
    return start_model(cls, config, AttributeSchema([Attribute(name) for name in names]))


def test_training_begins_with_a_classifier(tmp_path: Path) -> None:
    named, unnamed = tmp_path / "named", tmp_path / "unnamed"
    head = make_classifier(named, id2label=dict(enumerate(SCHEMA.names))).score.weight
    make_classifier(unnamed)
    for folder, names, kept in (
        (named, SCHEMA.names, True),
        (named, ("humor", "quality", "verbosity"), False),
        (named, ("quality",), False),
        (unnamed, ("a", "b", "c"), True),
        (unnamed, ("a", "b"), False),
    ):
        model = _start(AttributeRegressor, folder, names)
        found = model.chunks[0].score.weight
        assert model.fresh_head is not kept and found.shape == (len(names), 32)
        assert torch.equal(found, head) if kept else found.std() < head.std() * 1.5
        if not kept and len(names) == 3:
            assert not torch.equal(found, head)
        assert model.card.template.label_start == "<value>"
        backbone = all_tensors(folder)["model.embed_tokens.weight"]
        assert torch.equal(model.chunks[0].embedding.word_embeddings.weight[:410], backbone)
    with pytest.raises(CheckpointError, match="a sequence classifier; it has no lm_head.weight"):
        _start(AttributeConditionedGPT, named, ("quality",))


def test_training_begins_with_an_exported_regressor(tmp_path: Path) -> None:
    template = PromptTemplate(label_start="<own>")
    tokenizer = make_tokenizer(tmp_path / "tokenizer", "markers")
    export(make_regressor(tmp_path / "model", tokenizer, template=template), tmp_path / "hf")
    names = SCHEMA.names
    model = _start(AttributeRegressor, tmp_path / "hf", names)
    assert model.card.template == template and model.fresh_head  # humor goes to 9 there, to 4 here
    import_(tmp_path / "hf", tmp_path / "again")
    assert _start(AttributeRegressor, tmp_path / "again", names).fresh_head


def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Its head had a bias, which would be lost without a word."""
    folder = make_regressor(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer", "markers"))
    card = model_folder.read(folder)
    chunks = gpt.build(card.architecture, configs.ParallelConfig(), outputs=3)
    chunks[0].score = torch.nn.Linear(32, 3)
    model_folder.write(folder, card, model_folder.read_tokenizer(folder), chunks)
    for use in (lambda: export(folder, tmp_path / "hf"), lambda: AttributeRegressor.from_pretrained(folder)):
        with pytest.raises(CheckpointError, match="an earlier version, whose head has a bias; train it again"):
            use()
    assert _start(AttributeRegressor, folder, ("quality",)).fresh_head  # its backbone is of use
    assert not (tmp_path / "hf").exists()

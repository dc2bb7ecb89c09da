from __future__ import annotations

import dataclasses
import inspect

import pytest
from omegaconf import MISSING

from nemo_steerlm import config
from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.template import PromptTemplate

CLASSES = [kind for _, kind in inspect.getmembers(config, dataclasses.is_dataclass)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_field_has_a_line_of_help_and_a_default_its_own_rules_allow(kind):
    for field in dataclasses.fields(kind):
        text = field.metadata["help"]
        assert text and "\n" not in text and text[0].islower() == text[0].isalpha() or text[0].isupper(), field.name
        if field.default == MISSING:
            assert field.metadata["example"], f"{kind.__name__}.{field.name} is mandatory: errors show an example"
        elif field.metadata["choices"] and field.default is not None:
            assert field.default in field.metadata["choices"]


def test_the_template_defaults_are_the_templates_own():
    assert dataclasses.asdict(config.TemplateConfig()) == PromptTemplate().to_dict()
    assert not config.TemplateConfig().own and config.TemplateConfig(user=None).own
    with pytest.raises(ConfigError, match="overlap"):
        config.TemplateConfig(turn_start="<extra_id_2>").validate()


def test_attributes_come_from_a_preset_a_file_and_changes_to_them(tmp_path):
    assert config.AttributesConfig(preset="helpsteer2").load() == AttributeSchema.load("helpsteer2")
    changed = {"humor": config.AttributeOptions(high=9), "warmth": config.AttributeOptions(low=1, high=3, default=2)}
    schema = config.AttributesConfig(preset="synthetic", schema=changed).require()
    assert schema.names == (*AttributeSchema.load("synthetic").names, "warmth")
    assert (schema["humor"].low, schema["humor"].high) == (0, 9)
    assert (schema["warmth"].low, schema["warmth"].high, schema["warmth"].default) == (1, 3, 2)
    AttributeSchema.load({"calm": {"high": 2}}).save(tmp_path / "mine.yaml")
    assert config.AttributesConfig(preset=str(tmp_path / "mine.yaml")).require().names == ("calm",)


def test_attributes_may_be_absent_only_where_that_makes_sense():
    assert config.AttributesConfig().load() is None
    with pytest.raises(ConfigError, match="attributes is missing.*attributes=helpsteer"):
        config.AttributesConfig().require()

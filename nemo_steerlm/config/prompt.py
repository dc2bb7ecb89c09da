"""What a prompt is made of: the attributes and the strings of the template."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config.fields import option
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.template import PromptTemplate


@dataclass(kw_only=True)
class AttributeOptions:
    """One attribute in `attributes.schema`; what is null stays as in the preset."""

    low: int | None = option(None, "lowest value")
    high: int | None = option(None, "highest value")
    default: int | None = option(None, "value at inference where the user gives none")
    description: str | None = option(None, "what it measures")


@dataclass(kw_only=True)
class AttributesConfig:
    """The attribute schema: a preset or YAML file, changed or extended by `schema`."""

    preset: str | None = option(None, "helpsteer, helpsteer2, oasst_0_9, ultrafeedback, synthetic, or a YAML file")
    schema: dict[str, AttributeOptions] = option(dict, "more attributes, or changes: attributes.schema.humor.high=9")

    def load(self) -> AttributeSchema | None:
        """The schema these settings describe, None where they name none.

        Raises:
            ConfigError: no such preset or file, or a range that makes no sense.
        """
        if self.preset is None and not self.schema:
            return None
        merged = AttributeSchema.load(self.preset).to_dict() if self.preset is not None else {}
        for name, options in self.schema.items():
            given = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
            merged[name] = {**merged.get(name, {}), **given}
        return AttributeSchema.load(merged)

    def require(self) -> AttributeSchema:
        """As `load`, for verbs that cannot do without.

        Raises:
            ConfigError: no schema is given.
        """
        schema = self.load()
        if schema is None:
            raise ConfigError(
                "attributes is missing; choose a preset (attributes=helpsteer) or a file (attributes=mine.yaml)"
            )
        return schema


@dataclass(kw_only=True)
class TemplateConfig:
    """Strings of the prompt; see `nemo_steerlm.template.PromptTemplate`."""

    system_start: str = option(PromptTemplate.system_start, "opens the prompt")
    turn_start: str = option(PromptTemplate.turn_start, "opens a turn; generation stops at it")
    label_start: str = option(PromptTemplate.label_start, "opens a label line")
    end_of_name: str = option(PromptTemplate.end_of_name, "ends a speaker's name and a label line")
    end_of_turn: str = option(PromptTemplate.end_of_turn, "ends the system prompt and a turn")
    system_name: str = option(PromptTemplate.system_name, "name in the first line")
    user: str = option(PromptTemplate.user, "speaker name of people")
    assistant: str = option(PromptTemplate.assistant, "speaker name of the model")
    system: str = option(PromptTemplate.system, "system prompt of rows that have none; '' = none is written")

    def build(self) -> PromptTemplate:
        """The template itself (raises ConfigError for strings that clash)."""
        return PromptTemplate(**dataclasses.asdict(self))

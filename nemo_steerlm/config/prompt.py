"""Settings of the prompt: the attributes and the strings of the template."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from nemo_steerlm.attributes import PRESETS, AttributeSchema
from nemo_steerlm.chat_template import own_strings, unused_token
from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer


@dataclass(kw_only=True)
class AttributeOptions(Settings):
    """One attribute in `attributes.schema`; a null value stays as in the preset."""

    low: int | None = option(None, "lowest value")
    high: int | None = option(None, "highest value")
    default: int | None = option(None, "value at inference where the user gives none")
    description: str | None = option(None, "what it measures")


@dataclass(kw_only=True)
class AttributesConfig(Settings):
    """The attribute schema: a preset or YAML file, changed or extended by `schema`."""

    preset: str | None = option(None, f"{', '.join(PRESETS)}, or a YAML file")
    schema: dict[str, AttributeOptions] = option(dict, "more attributes, or changes: attributes.schema.humor.high=9")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the schema can be loaded."""
        super().validate(prefix)
        self.load()

    def load(self) -> AttributeSchema | None:
        """The schema these settings describe, None where they name none.

        Raises:
            ConfigError: no such preset or file, or an invalid range.
        """
        if self.preset is None and not self.schema:
            return None
        merged = AttributeSchema.load(self.preset).to_dict() if self.preset is not None else {}
        for name, options in self.schema.items():
            given = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
            merged[name] = {**merged.get(name, {}), **given}
        return AttributeSchema.load(merged)

    def require(self) -> AttributeSchema:
        """As `load`, for verbs that need a schema.

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
class TemplateConfig(Settings):
    """Strings of the prompt, see `nemo_steerlm.template.PromptTemplate`; null: from the model's own chat template."""

    system_start: str | None = option(PromptTemplate.system_start, "opens the prompt")
    turn_start: str | None = option(PromptTemplate.turn_start, "opens a turn; generation stops at it")
    label_start: str | None = option(
        PromptTemplate.label_start, "opens an attribute string; null = an unused special token"
    )
    end_of_name: str | None = option(PromptTemplate.end_of_name, "ends a speaker's name and an attribute string")
    end_of_turn: str | None = option(
        PromptTemplate.end_of_turn, "ends the system prompt and a turn; generation stops at a marker in it"
    )
    system_name: str | None = option(PromptTemplate.system_name, "name in the first line")
    user: str | None = option(PromptTemplate.user, "speaker name of users")
    assistant: str | None = option(PromptTemplate.assistant, "speaker name of the model")
    system: str | None = option(PromptTemplate.system, "system prompt of rows that have none; '' = none is written")

    @property
    def own(self) -> bool:
        """Whether strings are those of the model's own chat template."""
        return any(value is None for name, value in dataclasses.asdict(self).items() if name != "label_start")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the strings that are given do not clash."""
        super().validate(prefix)
        PromptTemplate.from_dict(
            {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        )

    def build(self, tokenizer: Tokenizer, ends: Collection[int] = ()) -> PromptTemplate:
        """The template itself.

        Args:
            tokenizer: the model's.
            ends: further end-of-text ids of the model.

        Raises:
            ConfigError: strings that clash, or a null string is not found in the tokenizer.
        """
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.own:
            given = own_strings(tokenizer) | given
        if self.label_start is None:
            given["label_start"] = unused_token(tokenizer, given.values(), ends)
        return PromptTemplate(**given)

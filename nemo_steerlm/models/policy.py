"""The attribute-conditioned policy: a language model that answers in the way the attributes ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.megatron.generation import Generation, generate
from nemo_steerlm.megatron.model_folder import ModelCard
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.models.batches import MicroBatch
from nemo_steerlm.models.losses import cross_entropy
from nemo_steerlm.speakers import USER

Asked = Mapping[str, float | None] | None


class AttributeConditionedGPT(MegatronModel):
    """A GPT fine-tuned on answers that follow a line with their attributes (arXiv 2310.05344, section 3.3)."""

    kind = "policy"

    @classmethod
    def check_kind(cls, card: ModelCard, path: Path) -> None:
        """A plain language model generates too; it just knows no attributes."""
        if card.kind != "language_model":
            super().check_kind(card, path)

    def forward_loss(
        self, output: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Cross-entropy of `output` `[n, vocabulary / tp]`, the n tokens of responses and their closing markers."""
        return *cross_entropy(output, batch["targets"], self.card.architecture.vocab_size), {}

    def prompt_tokens(self, conversation: Conversation, attributes: Mapping[str, float] | None) -> list[int]:
        """Token ids up to where the answer starts, the label line included.

        Raises:
            DataError: an unknown attribute or a value out of range.
        """
        # A plain language model has no schema; nothing is asked of it, and no label line written.
        schema = self.card.schema or AttributeSchema.load("helpsteer")
        return self.card.template.encode_prompt(conversation, schema, attributes, self.tokenizer)

    def sample(self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, **kwargs: Any) -> list[Generation]:
        """Continue token prompts; see `nemo_steerlm.megatron.generation.generate`."""
        self.build()
        return generate(
            self.chunks[0], self.tokenizer, [list(p) for p in prompts], settings,
            vocab_size=self.card.architecture.vocab_size, **kwargs,
        )  # fmt: skip

    def request(self, attributes: Mapping[str, float | None] | None) -> dict[str, float]:
        """What `generate` asks for, given these (`AttributeSchema.complete`); nothing of a plain language model.

        Raises:
            ConfigError: an unknown attribute, or one asked of a plain language model.
            DataError: a value out of range.
        """
        if self.card.schema is not None:
            return self.card.schema.complete(attributes)
        if attributes:
            raise ConfigError(
                f"attributes.{next(iter(attributes))}: this is a plain language model; run train-sft first"
            )
        return {}

    @overload
    def generate(self, prompt: str | Conversation, attributes: Asked = None, **settings: Any) -> str: ...

    @overload
    def generate(self, prompt: list[str | Conversation], attributes: Asked = None, **settings: Any) -> list[str]: ...

    def generate(  # type: ignore[misc]  # the overloads leave the settings to this signature
        self,
        prompt: str | Conversation | Sequence[str | Conversation],
        attributes: Asked = None,
        *,
        system: str = DEFAULT_SYSTEM,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Answer a prompt, or each of a list, in the way `attributes` ask for.

        Args:
            prompt: the user's message, or a conversation that ends with one; or a list of these.
            attributes: what to steer, e.g. ``{"humor": 4}``. The others take the schema's defaults; None as a value
                leaves its attribute out, so ``dict.fromkeys(policy.schema.names)`` asks for nothing. `request` tells
                which values are used.
            temperature: 0 is greedy, as in the paper.

        Returns:
            The answer, or a list of answers in the order of the prompts.

        Raises:
            ConfigError: an unknown attribute.
            DataError: a value out of range.
        """
        prompts = [prompt] if isinstance(prompt, (str, Conversation)) else prompt
        template, asked = self.card.template, self.request(attributes)
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=(template.stop,),
            seed=seed,
        )  # fmt: skip
        rows = [
            one if isinstance(one, Conversation) else Conversation(turns=[Turn(USER, one)], system=system)
            for one in prompts
        ]
        drawn = self.sample([self.prompt_tokens(row, asked) for row in rows], settings)
        answers = [template.parse_response(one.text) for one in drawn]
        return answers[0] if prompts is not prompt else answers

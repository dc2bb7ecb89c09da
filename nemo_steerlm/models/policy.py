"""The attribute-conditioned policy: a language model that answers in the way the attributes ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron.generation import Generation, SamplingSettings, generate
from nemo_steerlm.megatron.model_folder import ModelCard
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.models.batches import MicroBatch
from nemo_steerlm.models.losses import cross_entropy


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
        targets = batch["targets"][batch["mask"]]
        return *cross_entropy(output, targets, self.card.architecture.vocab_size), {}

    def prompt_tokens(self, conversation: Conversation, attributes: Mapping[str, float] | None) -> list[int]:
        """Token ids up to where the answer starts, the label line included.

        Raises:
            ConfigError: an unknown attribute or a value out of range.
        """
        schema = self.card.schema
        if schema is None:
            if attributes:
                raise ConfigError(
                    f"attributes.{next(iter(attributes))}: this is a plain language model; run train-sft first"
                )
            schema = AttributeSchema.load("helpsteer")  # writes no label line: nothing is asked for
        return self.card.template.encode_prompt(conversation, schema, attributes, self.tokenizer)

    def sample(self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, **kwargs: Any) -> list[Generation]:
        """Continue token prompts; see `nemo_steerlm.megatron.generation.generate`."""
        self.build()
        return generate(
            self.chunks[0], self.tokenizer, [list(p) for p in prompts], settings,
            vocab_size=self.card.architecture.vocab_size, **kwargs,
        )  # fmt: skip

    def generate(
        self,
        prompt: str | Conversation,
        attributes: Mapping[str, float] | None = None,
        *,
        system: str = DEFAULT_SYSTEM,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Answer one prompt in the way `attributes` ask for.

        Args:
            prompt: the user's message, or a conversation that ends with one.
            attributes: any subset of the schema, e.g. ``{"humor": 4}``; None or {} for no label line.
            temperature: 0 is greedy, as in the paper.

        Raises:
            ConfigError: an unknown attribute or a value out of range.
        """
        if isinstance(prompt, str):
            prompt = Conversation(turns=[Turn(self.card.template.user, prompt)], system=system)
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            stop=(self.card.template.stop,), seed=seed,
        )  # fmt: skip
        return self.card.template.parse_response(
            self.sample([self.prompt_tokens(prompt, attributes)], settings)[0].text
        )

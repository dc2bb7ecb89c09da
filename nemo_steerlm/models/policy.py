"""The attribute-conditioned policy: a language model whose answers follow the requested attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import DEFAULT_SYSTEM, Conversation, Turn
from nemo_steerlm.data.prefixes import shared_rows
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import lora, parallel, token_adapter
from nemo_steerlm.megatron.cross_entropy import token_losses
from nemo_steerlm.megatron.decoding import project, serving, to_device
from nemo_steerlm.megatron.drawing import SamplingSettings
from nemo_steerlm.megatron.generation import Generation, generate
from nemo_steerlm.megatron.inference import batch_tokens_by_default, broadcast_from_last_stage, read
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.progress import Progress
from nemo_steerlm.speakers import USER

Asked = Mapping[str, float | None] | None
_LOGIT_ROWS = 1024  # at most so many rows of logits are held at once


class AttributeConditionedGPT(MegatronModel):
    """A GPT fine-tuned on answers preceded by their attribute string (arXiv 2310.05344, section 3.3)."""

    kind = "policy"

    @classmethod
    def check_kind(cls, card: ModelCard, path: Path) -> None:
        """Accept a plain language model too; it has no attributes."""
        if card.kind != "language_model":
            super().check_kind(card, path)

    def freeze_trunk(self) -> None:
        """Leave only the embeddings of attribute tokens to be trained, where the tokenizer has them.

        Raises:
            ConfigError: nothing else is to be trained, and the tokenizer splits an `attribute:value`.
        """
        ids = {token: self.tokenizer.token_id(token) for token in self.schema.tokens}
        split = [token for token, id_ in ids.items() if id_ is None]
        if split and self.cfg.get("freeze", "none") == "trunk":
            raise ConfigError(
                f"model.freeze=trunk trains a policy's attribute tokens alone, but the tokenizer splits {split[0]} "
                f"({len(split)} of {len(ids)}); give the same attributes= to import, or use model.lora.rank=16"
            )
        lora.freeze_trunk(self.chunks)
        whole = [id_ for id_ in ids.values() if id_ is not None]
        if whole:
            token_adapter.add(self.chunks, whole, self.card.architecture.vocab_size)

    def prompt_tokens(self, conversation: Conversation, attributes: Mapping[str, float] | None) -> list[int]:
        """Token ids up to where the answer starts, the attribute string included.

        Raises:
            DataError: an unknown attribute or a value out of range.
        """
        # A plain language model has no schema; nothing is asked of it, and no attribute string written.
        schema = self.card.schema or AttributeSchema.load("helpsteer")
        return self.card.template.encode_prompt(conversation, schema, attributes, self.tokenizer)

    def sample(self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, **kwargs: Any) -> list[Generation]:
        """Continue token prompts; see `nemo_steerlm.megatron.generation.generate`."""
        self.build()
        return generate(
            self.chunks[0], self.tokenizer, [list(p) for p in prompts], settings,
            vocab_size=self.card.architecture.vocab_size, ends=self.card.ends, **kwargs,
        )  # fmt: skip

    def response(self, answer: Generation) -> str:
        """The text of a sampled answer, without its end marker."""
        return self.card.template.parse_response(answer.text, cut=answer.finish == "length")

    def losses(
        self,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        batch_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Negative log-likelihood of the targets of each text, each data-parallel rank reading its share.

        Args:
            texts: ids and loss mask, both [sequence], of `PromptTemplate.encode_policies`; a shared prefix is computed
                once.
            batch_tokens: tokens of one forward pass; None for what suits the device.
            progress: called with the number of texts just read.

        Returns:
            The sum over the targets in nats, float64 `[len(texts)]`, the same on every rank.
        """
        rank, ranks = parallel.data_parallel()
        sums = torch.zeros(len(texts), dtype=torch.float64, device=parallel.device())
        sums[rank::ranks] = self._read_losses(texts[rank::ranks], batch_tokens or batch_tokens_by_default(), progress)
        return parallel.sum_over_data_parallel(sums).cpu().numpy()

    def _read_losses(
        self,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        batch_tokens: int,
        progress: Callable[[int], None] | None,
    ) -> torch.Tensor:
        self.build()
        model = self.chunks[0]
        sums = torch.zeros(len(texts), dtype=torch.float64, device=parallel.device())
        with serving(model):
            for row in shared_rows([ids for ids, _ in texts], batch_tokens):
                hidden = read(model, row, everywhere=True)
                masks = [np.flatnonzero(np.asarray(texts[number][1])[1:]) for number in row.texts]
                places = np.concatenate([path[mask] for path, mask in zip(row.paths, masks)])
                targets = np.concatenate([row.tokens[path[mask + 1]] for path, mask in zip(row.paths, masks)])
                owners = np.repeat(row.texts, list(map(len, masks)))
                for part in range(0, len(places), _LOGIT_ROWS):
                    if hidden is None:
                        break
                    at, ids, whose = (
                        to_device(array[part : part + _LOGIT_ROWS], sums.device) for array in (places, targets, owners)
                    )
                    losses = token_losses(project(model, hidden[at]), ids, self.card.architecture.vocab_size)
                    sums.index_add_(0, whose, losses.double())
                if progress is not None:
                    progress(len(row.texts))
        return broadcast_from_last_stage(sums)

    def request(self, attributes: Mapping[str, float | None] | None) -> dict[str, float]:
        """The complete request that `generate` makes of these (`AttributeSchema.complete`); empty without attributes.

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
    def generate(
        self,
        prompt: list[str] | list[Conversation] | list[str | Conversation],
        attributes: Asked = None,
        **settings: Any,
    ) -> list[str]: ...

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
        progress: bool = False,
    ) -> str | list[str]:
        """Answer a prompt, or each of a list, conditioned on `attributes`.

        Args:
            prompt: the user's message, or a conversation that ends with one; or a list of these.
            attributes: what to steer, e.g. ``{"humor": 4}``. The others take the schema's defaults; None as a value
                leaves its attribute out, so ``dict.fromkeys(policy.schema.names)`` asks for nothing. `request` tells
                which values are used.
            system: system prompt of messages; the default stands for that of the model's template.
            temperature: 0 is greedy, as in the paper.
            progress: count the tokens on standard error as they are drawn.

        Returns:
            The answer, or a list of answers in the order of the prompts.

        Raises:
            ConfigError: an unknown attribute.
            DataError: a value out of range.
        """
        prompts = [prompt] if isinstance(prompt, (str, Conversation)) else prompt
        asked = self.request(attributes)
        settings = SamplingSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            stop=self.card.template.stops,
        )  # fmt: skip
        rows = [
            one if isinstance(one, Conversation) else Conversation(turns=[Turn(USER, one)], system=system)
            for one in prompts
        ]
        tokens = [self.prompt_tokens(row, asked) for row in rows]
        with Progress("generate", None, "tokens", shown=progress and parallel.is_rank_zero()) as bar:
            drawn = self.sample(tokens, settings, progress=lambda _, count: bar.update(count))
        answers = [self.response(one) for one in drawn]
        return answers[0] if prompts is not prompt else answers

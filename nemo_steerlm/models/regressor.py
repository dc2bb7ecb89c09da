"""The attribute regressor: reads a conversation, predicts the attributes of an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from omegaconf import DictConfig

from nemo_steerlm.calibration import Calibration
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.prefixes import shared_rows
from nemo_steerlm.errors import CheckpointError, ConfigError, DataError
from nemo_steerlm.formats import hf_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.decoding import serving, to_device
from nemo_steerlm.megatron.inference import batch_tokens_by_default, broadcast_from_last_stage, read
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.models.heads import LevelHead, make_head
from nemo_steerlm.models.pooling import pool_whole_texts
from nemo_steerlm.speakers import ASSISTANT
from nemo_steerlm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Regressor = TypeVar("Regressor", bound="AttributeRegressor")


class AttributeRegressor(MegatronModel):
    """A GPT backbone with one fp32 linear layer, read at the last token of the rendered answer or the mean of all.

    The head (`nemo_steerlm.models.heads`) defines what the layer's outputs mean; by default they are the values
    themselves (`train.tasks.RegressionTask`). The text of a response is `PromptTemplate.render_regression`.

    Attributes:
        head: the head that the model metadata names.
        fresh_head: whether the head's weights are the initial ones.
    """

    kind = "regressor"

    def __init__(self, cfg: DictConfig, tokenizer: Tokenizer, trainer: Any = None) -> None:
        super().__init__(cfg, tokenizer, trainer)
        self.head = make_head(self.card.head, self.schema)
        self.fresh_head = True

    _variants: ClassVar[dict[str, type[AttributeRegressor]]] = {}  # heads that are models of their own

    def __init_subclass__(cls, head: str | None = None, **kwargs: Any) -> None:
        """Register the model of a head; `nemo_steerlm.models` imports them all."""
        super().__init_subclass__(**kwargs)
        if head is not None:
            AttributeRegressor._variants[head] = cls

    @classmethod
    def variant(cls, card: ModelCard) -> type[MegatronModel]:
        """The class of the card's head: this one, or a model of its own."""
        return cls._variants.get(card.head, cls)

    @property
    def outputs(self) -> int:
        """Raw outputs of the head."""
        return self.head.outputs

    def fresh_parameters(self, source: ModelCard) -> tuple[str, ...]:
        """The head is new unless the source is a regressor of the same attributes, head and pooling.

        A sequence classifier with as many unnamed outputs is taken to predict these attributes.
        """
        mine, theirs = ((card.kind, card.head, card.pooling) for card in (self.card, source))
        found = source.schema if source.kind == "regressor" else None
        unnamed = found is not None and hf_folder.unnamed(found) and len(found) == len(self.schema)
        self.fresh_head = mine != theirs or not (unnamed or found == self.schema)
        if self.fresh_head and source.kind == "regressor":
            _log.warning(
                "the head starts anew: it is head=%s, model.pooling=%s for %s, the one to start from is head=%s, "
                "model.pooling=%s for %s",
                self.card.head, self.card.pooling, self.schema, source.head, source.pooling, source.schema,
            )  # fmt: skip
        return ("score.",) if self.fresh_head else ()

    # ---------------------------------------------------------------- inference

    _calibration: Calibration | None = None

    @property
    def calibration(self) -> Calibration | None:
        """Applied to what `predict` and `distribution` return; None = raw.

        A temperature acts in the head, the other calibrations on values. Setting a temperature for a head without a
        distribution raises CheckpointError.
        """
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: Calibration | None) -> None:
        temperatures = None if calibration is None else calibration.temperatures(self.schema)
        if isinstance(self.head, LevelHead):
            self.head.temperatures = temperatures
        elif temperatures is not None:
            raise CheckpointError(
                f"calibration.json holds temperatures, but head={self.card.head} has no distribution; remove the file "
                "or fit it again with calibrate=isotonic"
            )
        self._calibration = calibration

    @classmethod
    def from_pretrained(cls: type[Regressor], path: Path | str, **settings: Any) -> Regressor:  # type: ignore[override]
        """As every model's, with the calibration that the folder holds."""
        model = super().from_pretrained(path, **settings)  # type: ignore[misc]
        if Path(path).is_dir():
            model.calibration = Calibration.read(path, model.schema)
        return model

    def save_pretrained(self, folder: Path | str) -> None:
        """As every model's, with the calibration where there is one."""
        super().save_pretrained(folder)
        if self.calibration is not None and parallel.is_rank_zero():
            self.calibration.write(folder)
        parallel.barrier()

    def predict(
        self,
        texts: Sequence[Sequence[int]],
        batch_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Values of already tokenised answers.

        Args:
            texts: token ids of `PromptTemplate.render_regression`, any lengths.
            batch_tokens: tokens of one forward pass, in which a shared prefix is computed once; None for what suits
                the device.
            progress: called with the number of texts just done.

        Returns:
            `[len(texts), K]` float32, in the schema's order, corrected by `calibration`; the same on every rank of the
            model.

        Raises:
            CheckpointError: a value is not finite.
        """
        return self._corrected(self._read(texts, self.head.values, len(self.schema), batch_tokens, progress))

    def predict_over_ranks(self, texts: Sequence[Sequence[int]], batch_tokens: int | None = None) -> np.ndarray:
        """As `predict`, each data-parallel rank doing its share of the texts; every rank gets all values."""
        # Corrected after the sum: where a value is not finite every rank raises, and none waits for another.
        return self._corrected(self._over_ranks(texts, self.head.values, len(self.schema), batch_tokens))

    def _over_ranks(
        self,
        texts: Sequence[Sequence[int]],
        values_of: Callable[[torch.Tensor], torch.Tensor],
        columns: int,
        batch_tokens: int | None,
    ) -> np.ndarray:
        """As `_read`, each data-parallel rank doing its share of the texts."""
        rank, ranks = parallel.data_parallel()
        values = torch.zeros(len(texts), columns)
        values[rank::ranks] = torch.from_numpy(self._read(texts[rank::ranks], values_of, columns, batch_tokens))
        return parallel.sum_over_data_parallel(values.to(parallel.device())).cpu().numpy()

    def _corrected(self, values: np.ndarray) -> np.ndarray:
        """Values `[n, K]` after `calibration` (raises CheckpointError where one is not finite)."""
        if not np.isfinite(values).all():
            raise CheckpointError(
                "the regressor predicts values that are not finite: its training diverged, or its weights are "
                "damaged; train it again with a lower optimizer.lr, or take an earlier checkpoint"
            )
        return values if self.calibration is None else self.calibration.apply(values, self.schema)

    def distribution(
        self,
        texts: Sequence[Sequence[int]],
        batch_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Probabilities of the levels of already tokenised answers; arguments as `predict`'s.

        Returns:
            For each attribute `[len(texts), levels]` float32, of low, low + 1, ..., high.

        Raises:
            ConfigError: the head predicts values alone.
        """
        head = self.level_head()
        return self._by_attribute(self._read(texts, head.probabilities, head.columns, batch_tokens, progress))

    def distribution_over_ranks(
        self, texts: Sequence[Sequence[int]], batch_tokens: int | None = None
    ) -> dict[str, np.ndarray]:
        """As `distribution`, each data-parallel rank doing its share of the texts; every rank gets all of them."""
        head = self.level_head()
        return self._by_attribute(self._over_ranks(texts, head.probabilities, head.columns, batch_tokens))

    def expectation(self, distribution: Mapping[str, np.ndarray]) -> np.ndarray:
        """The values that `predict` returns, computed from the result of `distribution`."""
        columns = torch.from_numpy(np.concatenate([distribution[name] for name in self.schema.names], axis=1))
        return self._corrected(self.level_head().means(columns).numpy())

    def level_head(self) -> LevelHead:
        """The head (raises ConfigError where it predicts values alone)."""
        if not isinstance(self.head, LevelHead):
            raise ConfigError(
                f"a regressor with head={self.card.head} has no probabilities; train one with head=distribution"
            )
        return self.head

    def _by_attribute(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(columns, np.cumsum(self.level_head().sizes)[:-1], axis=1)
        return dict(zip(self.schema.names, parts, strict=True))

    def _read(
        self,
        texts: Sequence[Sequence[int]],
        values_of: Callable[[torch.Tensor], torch.Tensor],
        columns: int,
        batch_tokens: int | None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """`values_of` (`[n, R]` to `[n, columns]`) of the head's raw outputs, for all texts."""
        model, mean, device = self.chunks[0], self.card.pooling == "mean", parallel.device()
        order: list[int] = []
        parts: list[torch.Tensor] = []
        with serving(model):
            for row in shared_rows(texts, batch_tokens or batch_tokens_by_default()):
                hidden = read(model, row, everywhere=mean)
                if hidden is not None:
                    raw = model.score(hidden.float())
                    if mean:
                        together = raw[to_device(np.concatenate(row.paths), device)]
                        raw = pool_whole_texts(together, list(map(len, row.paths)))
                    parts.append(values_of(raw).float())
                order += row.texts
                if progress is not None:
                    progress(len(row.texts))
        found = torch.cat(parts) if parts else torch.zeros(len(order), columns, device=device)
        values = np.empty((len(order), columns), np.float32)
        values[order] = broadcast_from_last_stage(found).cpu().numpy()  # the only wait for the device
        return values

    def score(self, conversations: Sequence[Any]) -> list[dict[str, float]]:
        """Rate the last response of each conversation.

        Args:
            conversations: each a `Conversation`, a JSON row, or a list of OpenAI's messages.

        Returns:
            For each conversation the predicted value (float, not clamped) of every attribute.

        Raises:
            DataError: a conversation has no assistant turn, or is malformed.
        """
        places, names = [], (ASSISTANT, self.card.template.assistant)
        for number, given in enumerate(conversations):
            conversation = Conversation.of(given, f"conversation {number}")
            turns = [i for i, turn in enumerate(conversation.turns) if turn.speaker in names]
            if not turns:
                raise DataError(f"conversation {number}: it has no turn from {self.card.template.assistant} to rate")
            places.append((conversation, turns[-1]))
        texts = self.card.template.encode_regressions(places, self.tokenizer)
        return [dict(zip(self.schema.names, map(float, row), strict=True)) for row in self.predict(texts)]

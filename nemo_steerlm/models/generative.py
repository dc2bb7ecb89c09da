"""The paper's attribute model: a language model that continues a conversation with its attribute string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from nemo_steerlm.data.label_string import LabelString
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron.decoding import Decoder, serving
from nemo_steerlm.megatron.inference import batch_tokens_by_default, broadcast_from_last_stage
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.tokenizer import Tokenizer


class GenerativeRegressor(AttributeRegressor, head="generative"):
    """Predicts attributes as text (SteerLM, arXiv 2310.05344, section 3.2); used like any `AttributeRegressor`.

    Trained by `train.tasks.GenerativeTask`. Attributes are predicted in the schema's order: the distribution of a
    value is the softmax over the tokens of its levels, given the likeliest levels of the attributes before it (the
    paper's greedy decoding, equation 2). The prediction is that distribution's mean. In validation the labels of the
    earlier attributes are given, as in training.

    Raises:
        ConfigError: a setting of a head that is a layer of its own, or a level that is not one token.
    """

    def __init__(self, cfg: DictConfig, tokenizer: Tokenizer, trainer: Any = None) -> None:
        super().__init__(cfg, tokenizer, trainer)
        if self.card.pooling != "last":
            raise ConfigError(f"model.pooling={self.card.pooling}: head=generative pools nothing; use pooling=last")
        if cfg.get("freeze", "none") == "trunk":
            raise ConfigError("model.freeze=trunk: head=generative has no head to train alone; use model.lora.rank=16")
        self.strings = LabelString(self.schema, tokenizer)
        self.fresh_head = False

    @property
    def outputs(self) -> None:  # type: ignore[override]
        """A language model: it has a vocabulary projection and no other head."""
        return None

    def fresh_parameters(self, source: ModelCard) -> tuple[str, ...]:
        """None (raises CheckpointError where the source has no vocabulary projection)."""
        lost = source.kind == "regressor" and source.head != "generative"
        if lost and not source.architecture.tie_word_embeddings:
            raise CheckpointError(
                f"model.init is a regressor with head={source.head}, which has no vocabulary projection; "
                "start head=generative from a language model or a policy"
            )
        return ()

    def _read(
        self,
        texts: Sequence[Sequence[int]],
        values_of: Callable[[torch.Tensor], torch.Tensor],
        columns: int,
        batch_tokens: int | None,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """As `AttributeRegressor._read`; the raw outputs are the logits of the level tokens."""
        values = np.zeros((len(texts), columns), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with serving(self.chunks[0]):
            for group in _batches_by_length(order, texts, batch_tokens or batch_tokens_by_default()):
                values[group] = values_of(self._level_logits([texts[i] for i in group])).cpu().numpy()
                if progress is not None:
                    progress(len(group))
        return values

    def _level_logits(self, texts: list[Sequence[int]]) -> torch.Tensor:
        """Logits of all levels of all attributes after texts, `[n, C]`; each text is read once."""
        names = sum(1 + len(self.strings.name(k, first=k == 0)) for k in range(len(self.strings.levels)))
        longest = max(map(len, texts)) + names
        decoder = Decoder(self.chunks[0], len(texts), self.card.architecture.vocab_size, longest)
        rows, parts = np.arange(len(texts)), []
        logits = decoder.prefill([[*ids, *self.strings.name(0, first=True)] for ids in texts], rows, rows)
        for k, ids in enumerate(self.strings.levels):
            part = decoder.on_device(np.zeros((len(texts), len(ids)), np.float32))
            if logits is not None:
                part.copy_(logits[:, decoder.on_device(ids)])
            parts.append(broadcast_from_last_stage(part))
            if k + 1 < len(self.strings.levels):
                chosen = np.array(ids)[part.argmax(-1).cpu().numpy()]
                for token in (chosen, *self.strings.name(k + 1, first=False)):
                    logits = decoder.decode(np.broadcast_to(token, rows.shape), rows)
        return torch.cat(parts, dim=-1)


def _batches_by_length(order: list[int], texts: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Cut indices sorted by length so that rows x longest stays within `batch_tokens`."""
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(texts[i]) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups

"""The paper's attribute model: a language model that continues a conversation with its attribute string."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from omegaconf import DictConfig

from nemo_steerlm.data.label_string import LabelString
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.decoding import Decoder, serving
from nemo_steerlm.megatron.inference import batch_tokens_by_default, broadcast_from_last_stage
from nemo_steerlm.models.batches import Item, MicroBatch, collate_regression
from nemo_steerlm.models.losses import cross_entropy
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.tokenizer import Tokenizer


class GenerativeRegressor(AttributeRegressor):
    """Predicts attributes as text (SteerLM, arXiv 2310.05344, section 3.2); used like any `AttributeRegressor`.

    Trained by the cross-entropy of the label string alone. Read attribute by attribute in the schema's order: the
    distribution of a value is the softmax over the tokens of its levels, given the likeliest levels of the attributes
    before it (the paper's greedy decoding, equation 2; what a reader of the labels would see). The value is that
    distribution's mean. In validation the earlier values are the label's own, as in training.

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
        """Nothing is new (raises CheckpointError where the source has no vocabulary projection)."""
        lost = source.kind == "regressor" and source.head != "generative"
        if lost and not source.architecture.tie_word_embeddings:
            raise CheckpointError(
                f"model.init is a regressor with head={source.head}, which has no vocabulary projection; "
                "start head=generative from a language model or a policy"
            )
        return ()

    def collate(self, items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
        """As `collate_regression`, of items that end with their label string, which is what is to be predicted.

        Adds `places` and `targets` as `collate_policy`; `value_rows` `[m]`, which of them are values; and `label_rows`
        `[samples, K]`, which of the m values each label is (m = none).
        """
        outputs = len(self.schema)
        places: list[int] = []
        targets: list[int] = []
        value_of: list[int] = []  # of each place sample times K plus attribute, or -1
        for number, (item, start) in enumerate(zip(items, starts, strict=True)):
            if item is not None:
                ids, attributes = self.strings.encode(item["labels"].tolist())
                end = start + len(item["tokens"]) - 1
                places += range(end - len(ids), end)
                targets += ids
                value_of += [number * outputs + k if k >= 0 else -1 for k in attributes]
        owners = np.array(value_of, np.int64)
        values = np.flatnonzero(owners >= 0)
        labelled = np.full(len(items) * outputs, len(values))
        labelled[owners[values]] = np.arange(len(values))
        return {
            **collate_regression(items, starts, shape, outputs=outputs),
            "places": torch.tensor(places, dtype=torch.long),
            "targets": torch.tensor(targets, dtype=torch.long),
            "value_rows": torch.from_numpy(values),
            "label_rows": torch.from_numpy(labelled.reshape(-1, outputs)),
        }

    def forward_loss(
        self, output: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Cross-entropy of `output` `[n, vocabulary / tp]`, the n tokens of the label strings."""
        kept = {}
        if not self.training:  # first: the loss works in place
            kept = {name: batch[name] for name in ("labels", "indices", "dataset")}
            kept["values"] = self._labelled_values(output, batch)
        return *cross_entropy(output, batch["targets"], self.card.architecture.vocab_size), kept

    @functools.cached_property
    def _levels(self) -> list[torch.Tensor]:
        return [torch.tensor(ids, device=parallel.device()) for ids in self.strings.levels]

    def _labelled_values(self, output: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Values `[samples, K]` where there is a label, given the labels before it; NaN elsewhere."""
        logits = gather_from_tensor_model_parallel_region(output[batch["value_rows"]]).float()
        rows = torch.cat((logits, logits.new_zeros(1, logits.shape[1])))[batch["label_rows"]]
        raw = torch.cat([rows[:, k, ids] for k, ids in enumerate(self._levels)], dim=-1)
        return torch.where(torch.isnan(batch["labels"]), torch.nan, self.head.values(raw))

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

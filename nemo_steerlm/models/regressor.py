"""The attribute regressor: reads a conversation, predicts the attributes of an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import DictConfig

from nemo_steerlm.agreement import attribute_metrics
from nemo_steerlm.calibration import Calibration
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.data.prefixes import shared_rows
from nemo_steerlm.errors import CheckpointError, ConfigError, DataError
from nemo_steerlm.formats import hf_folder
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.decoding import serving, to_device
from nemo_steerlm.megatron.inference import batch_tokens_by_default, broadcast_from_last_stage, read
from nemo_steerlm.models.base import MegatronModel, rows_over_ranks, sum_over_ranks
from nemo_steerlm.models.batches import Item, MicroBatch, collate_regression
from nemo_steerlm.models.heads import LevelHead, make_head
from nemo_steerlm.models.losses import Objective
from nemo_steerlm.speakers import ASSISTANT
from nemo_steerlm.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Regressor = TypeVar("Regressor", bound="AttributeRegressor")


class AttributeRegressor(MegatronModel):
    """A GPT backbone with one fp32 linear layer, read at the last token of the rendered answer or the mean of all.

    What the layer's numbers mean is the head's business (`nemo_steerlm.models.heads`); by default they are the values
    themselves, trained by masked squared error on the attributes' own scale (HelpSteer, arXiv 2311.09528, section
    4.4). The text of a response is `PromptTemplate.render_regression`.

    Attributes:
        head: the kind of head the card names.
        objective: what a training minimises.
        fresh_head: whether the head's weights are the initial ones.
        datasets: names of the data sets it is validated on; `dataset` of a micro-batch is a place in it.
    """

    kind = "regressor"

    def __init__(self, cfg: DictConfig, tokenizer: Tokenizer, trainer: Any = None) -> None:
        super().__init__(cfg, tokenizer, trainer)
        self.head = make_head(self.card.head, self.schema)
        self.objective = Objective(self.head)
        self.fresh_head = True
        self.datasets: list[str] = []

    @classmethod
    def variant(cls, card: ModelCard) -> type[MegatronModel]:
        """A generative head is a model of its own."""
        if card.head != "generative":
            return cls
        from nemo_steerlm.models.generative import GenerativeRegressor

        return GenerativeRegressor

    @property
    def outputs(self) -> int:
        """Raw numbers of the head."""
        return self.head.outputs

    def fresh_parameters(self, source: ModelCard) -> tuple[str, ...]:
        """The head is new unless the source is a regressor of the same attributes, head and pooling.

        A sequence classifier of as many outputs that nobody named is taken to be of these attributes.
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

    def collate(self, items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
        """What `forward_loss` reads; see `batches.collate_regression`."""
        return collate_regression(items, starts, shape, outputs=len(self.schema))

    start_at: torch.Tensor | None = None  # raw outputs `[R]` that training starts from; None: what the weights say

    def choose_trained(self) -> None:
        """As every model's, after the head was moved to `start_at`."""
        if self.start_at is not None:
            self._start_head_at(self.start_at)
        super().choose_trained()

    @torch.no_grad()
    def _start_head_at(self, start: torch.Tensor) -> None:
        """Let the head answer `start` to the mean state `h` that it reads in the first training batch.

        A head without bias can: all texts end with the same marker, so their states have much in common, and
        `W += (start - W h) h' / |h|^2` is the smallest change that does it. Runs at any layout, through the schedule.
        """
        assert self.training_batches is not None
        states: list[torch.Tensor] = []
        heads = [chunk.score for chunk in self.chunks if hasattr(chunk, "score")]
        hooks = [head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for head in heads]
        self.eval()
        kept = self.run(self.training_batches[0], forward_only=True)
        self.train()
        for head, hook in zip(heads, hooks, strict=True):
            hook.remove()
            pairs = zip(states, kept, strict=True)
            read_ = torch.cat([self._pool(s.transpose(0, 1).flatten(0, 1), k["first"], k["last"]) for s, k in pairs])
            total = torch.cat((read_.sum(0), read_.new_tensor([len(read_)])))
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
            mean = total[:-1] / total[-1]
            head.weight += torch.outer(start.to(mean) - head.weight @ mean, mean) / mean.dot(mean)

    def forward_loss(
        self, output: torch.Tensor, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The objective of `output` `[batch, seq, R]`, read where each sample lies."""
        raw = self._pool(output.flatten(0, 1), batch["first"], batch["last"])
        total, count, kept = self.objective(raw, batch)
        if self.training:
            return total, count, {}
        kept |= {name: batch[name] for name in ("labels", "indices", "dataset", "first", "last")}
        return total, count, {**kept, "values": self.head.values(raw)}

    def _pool(self, output: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """What the head says of each text: raw outputs `[n, R]`.

        The mean is taken after the layer, which is the same as before it: the layer is linear. It is over all tokens
        of the text, history included, as the reference's `use_avg_pool`.

        Args:
            output: `[tokens, R]`, texts one after another, possibly with padding in between.
            first, last: places of each text's first and last token, `[n]`, rising.
        """
        if self.card.pooling == "last":
            return output[last]
        places = torch.arange(len(output), device=output.device)
        owner = torch.searchsorted(last, places).clamp(max=len(last) - 1)
        inside = (places >= first[owner]) & (places <= last[owner])
        kept = torch.where(inside[:, None], output, 0.0)
        sums = output.new_zeros(len(last), output.shape[1]).index_add(0, owner, kept)
        return sums / (last - first + 1)[:, None]

    def validation_metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Loss, and `agreement`'s figures of every attribute, of each dataset too where there are several.

        Every sample of every rank counts exactly once, whatever the layout.
        """
        result = super().validation_metrics(kept) | self._preference_metrics(kept)
        count = len(self.schema)
        rows = [torch.cat((k["values"], k["labels"], k["dataset"][:, None]), 1) for k in kept]
        table = rows_over_ranks([k["indices"] for k in kept], rows, 2 * count + 1)
        values, labels, dataset = table[:, :count], table[:, count:-1], table[:, -1].astype(int)
        parts = {"": np.ones(len(table), bool)}
        if len(np.unique(dataset)) > 1:
            parts |= {f"{self.datasets[number]}/": dataset == number for number in np.unique(dataset)}
        for prefix, chosen in parts.items():
            for name, figures in attribute_metrics(values[chosen], labels[chosen], self.schema).items():
                if figures.pop("n"):
                    result |= {f"val/{prefix}{name}/{key}": value for key, value in figures.items()}
        return result

    def metric_names(self) -> list[str]:
        """The loss, `agreement`'s figures of every attribute, and those of preference pairs where they are trained."""
        figures = ("pearson", "spearman", "mae", "mse", "kappa", "accuracy")
        names = [f"val/{name}/{figure}" for name in self.schema.names for figure in figures]
        pairs = [] if self.objective.preferred is None else ["val/preference/loss", "val/preference/accuracy"]
        return [*super().metric_names(), *names, *pairs]

    def _preference_metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Mean loss of the preference pairs, and how many have the preferred response above the other."""
        if self.objective.preferred is None:
            return {}
        mine = torch.stack([k["preference"] for k in kept]).double().sum(0).unbind() if kept else [0.0] * 3
        total, right, pairs = sum_over_ranks(*mine, on_last_stage=kept != [])
        return {"val/preference/loss": total / pairs, "val/preference/accuracy": right / pairs} if pairs else {}

    # ---------------------------------------------------------------- inference

    _calibration: Calibration | None = None

    @property
    def calibration(self) -> Calibration | None:
        """Corrects what `predict` and `distribution` return; None = raw.

        A temperature acts in the head, the other calibrations on values. Setting one that the head has no use for
        raises CheckpointError.
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
            batch_tokens: tokens of one forward pass, in which what texts begin with alike is read once; None for what
                suits the device.
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
        """What `predict` returns, from what `distribution` did."""
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
        """What `values_of` makes of the head's raw outputs, `[n, R]` to `[n, columns]`, for all texts."""
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
                        raw = torch.stack([text.mean(0) for text in together.split(list(map(len, row.paths)))])
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
            DataError: a conversation has no assistant turn, or is none.
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

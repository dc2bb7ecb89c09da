"""Training losses and validation metrics: one class for each of SteerLM's losses (arXiv 2310.05344).

A task is passed to `MegatronModel.begin`. Every loss is a sum and a count: the gradients of all micro-batches and
ranks are summed and divided once by the sum of the counts. So a global batch has one mean, however it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_steerlm.agreement import attribute_metrics
from nemo_steerlm.config import LossConfig
from nemo_steerlm.megatron import parallel
from nemo_steerlm.megatron.cross_entropy import cross_entropy
from nemo_steerlm.megatron.reductions import rows_over_ranks, sum_over_ranks, totals
from nemo_steerlm.models.base import MegatronModel
from nemo_steerlm.models.generative import GenerativeRegressor
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.pooling import pool
from nemo_steerlm.models.regressor import AttributeRegressor
from nemo_steerlm.models.training import MicroBatch
from nemo_steerlm.train.batches import Item, collate_policy, collate_regression
from nemo_steerlm.train.losses import Objective

OWN, OTHER = "own labels", "other labels"  # the same responses with their own labels, and with other ones
Loss = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]  # sum, count, and what to keep for the metrics


class Task:
    """A loss with its batches and its validation metrics.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: MegatronModel) -> None:
        self.model: Any = model

    def collate(self, items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
        """A micro-batch of tokenised samples; see `batches.collate_policy`."""
        raise AssertionError("each task has its own")

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Loss:
        """Sum and count of one micro-batch on the last pipeline stage, from the network's `output`."""
        raise AssertionError("each task has its own")

    def metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics by name from what `loss` kept of all validation micro-batches."""
        total, count = sum_over_ranks(*totals(kept), on_last_stage=kept != [])
        return {"val/loss": total / max(count, 1.0)}

    def metric_names(self) -> list[str]:
        """Names of the `metrics` over all data together."""
        return ["val/loss"]

    def head_start(self, batches: Sequence[list[MicroBatch]]) -> None:
        """Move the weights before the training, given its batches; nothing by default."""


class _PredictionTask(Task):
    """The metrics of both attribute prediction models.

    Args:
        datasets: names of the datasets that are validated on; `dataset` of a micro-batch is a place in it.
    """

    def __init__(self, model: AttributeRegressor, datasets: Sequence[str] = ()) -> None:
        super().__init__(model)
        self.datasets = datasets

    def metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Loss, and `agreement`'s figures of every attribute; also of each dataset where there are several.

        Every sample of every rank counts exactly once, whatever the layout.
        """
        result, schema = super().metrics(kept), self.model.schema
        rows = [torch.cat((k["values"], k["labels"], k["dataset"][:, None]), 1) for k in kept]
        table = rows_over_ranks([k["indices"] for k in kept], rows, 2 * len(schema) + 1)
        values, labels, dataset = table[:, : len(schema)], table[:, len(schema) : -1], table[:, -1].astype(int)
        parts = {"": np.ones(len(table), bool)}
        if len(np.unique(dataset)) > 1:
            parts |= {f"{self.datasets[number]}/": dataset == number for number in np.unique(dataset)}
        for prefix, chosen in parts.items():
            for name, figures in attribute_metrics(values[chosen], labels[chosen], schema).items():
                if figures.pop("n"):
                    result |= {f"val/{prefix}{name}/{key}": value for key, value in figures.items()}
        return result

    def metric_names(self) -> list[str]:
        """The loss, and `agreement`'s figures of every attribute."""
        figures = ("pearson", "spearman", "mae", "mse", "kappa", "accuracy")
        return [*super().metric_names(), *(f"val/{n}/{figure}" for n in self.model.schema.names for figure in figures)]


class RegressionTask(_PredictionTask):
    """Attribute prediction by a head (HelpSteer, arXiv 2311.09528, section 4.4).

        L = sum_ik m_ik w_k l(f_k(x_i), v_ik) / sum_ik m_ik

    f_k(x_i) is the head's value of attribute k for the rendered text x_i of a response, v_ik the label, m_ik 1 where
    there is one and 0 where not, w_k the weight of the attribute (mean 1 over the labels), l the head's error:
    squared, Huber's, or the cross-entropy of levels. A preference pair adds its Bradley-Terry loss to the sum and 1 to
    the count.
    Mask, sum and count are `losses.Objective`'s; pooling is `models.pooling`'s; the division is megatron-core's.

    Args:
        model, datasets: as `_PredictionTask`.
        loss: the configuration.
        weights: of each attribute, `[K]`; see `losses.attribute_weights`.
        mean: the mean target of the training data `[C]`, which smoothing shrinks to; see `losses.mean_target`.
        start: raw outputs `[R]` that a new head is moved to; None leaves the head as it is.
    """

    def __init__(
        self,
        model: AttributeRegressor,
        datasets: Sequence[str] = (),
        loss: LossConfig | None = None,
        weights: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> None:
        super().__init__(model, datasets)
        self.objective, self.start = Objective(model.head, loss, weights, mean), start

    def collate(self, items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
        """See `batches.collate_regression`."""
        return collate_regression(items, starts, shape, outputs=len(self.model.schema))

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Loss:
        """The objective of `output` `[batch, seq, R]`, pooled over each sample."""
        raw = self._pool(output.flatten(0, 1), batch)
        total, count, kept = self.objective(raw, batch)
        if self.model.training:
            return total, count, {}
        kept |= {name: batch[name] for name in ("labels", "indices", "dataset", "first", "last")}
        return total, count, {**kept, "values": self.model.head.values(raw)}

    def _pool(self, output: torch.Tensor, places: MicroBatch) -> torch.Tensor:
        return pool(output, places["first"], places["last"], self.model.card.pooling)

    def metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Adds, with preference pairs, their mean loss and the share of pairs in the right order."""
        found = super().metrics(kept)
        if self.objective.preferred is None:
            return found
        mine = torch.stack([k["preference"] for k in kept]).double().sum(0).unbind() if kept else [0.0] * 3
        total, right, pairs = sum_over_ranks(*mine, on_last_stage=kept != [])
        own = {"val/preference/loss": total / pairs, "val/preference/accuracy": right / pairs} if pairs else {}
        return found | own

    def metric_names(self) -> list[str]:
        """Adds those of preference pairs, where pairs are trained on."""
        pairs = [] if self.objective.preferred is None else ["val/preference/loss", "val/preference/accuracy"]
        return [*super().metric_names(), *pairs]

    @torch.no_grad()
    def head_start(self, batches: Sequence[list[MicroBatch]]) -> None:
        """Make the head output `start` for the mean hidden state `h` of the first training batch.

        No bias is needed: all texts end with the same marker, so their hidden states are similar, and
        `W += (start - W h) h' / |h|^2` is the smallest change of W that does it. Works at any layout.
        """
        if self.start is None:
            return
        states: list[torch.Tensor] = []
        heads = [chunk.score for chunk in self.model.chunks if hasattr(chunk, "score")]
        hooks = [head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for head in heads]
        self.model.eval()
        kept = self.model.run(batches[0], forward_only=True)
        self.model.train()
        for head, hook in zip(heads, hooks, strict=True):
            hook.remove()
            pairs = zip(states, kept, strict=True)
            read = torch.cat([self._pool(state.transpose(0, 1).flatten(0, 1), places) for state, places in pairs])
            total = torch.cat((read.sum(0), read.new_tensor([len(read)])))
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
            mean = total[:-1] / total[-1]
            head.weight += torch.outer(self.start.to(mean) - head.weight @ mean, mean) / mean.dot(mean)


class GenerativeTask(_PredictionTask):
    """Attribute prediction as text (SteerLM, section 3.2, equation 1).

        L = - sum_i sum_t log P(s_it | x_i, s_i,<t) / sum_i |s_i|

    x_i is the rendered text of a response, s_i the tokens of its attribute string. Nothing else carries loss:
    `collate` gives the places of these tokens, `megatron.cross_entropy` sum and count.
    """

    def __init__(self, model: GenerativeRegressor, datasets: Sequence[str] = ()) -> None:
        super().__init__(model, datasets)
        self.levels: list[torch.Tensor] = []  # tokens of each attribute's levels, on the device

    def collate(self, items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
        """As `collate_regression`, for items that end with their attribute string, the target of the prediction.

        Adds `places` and `targets` as `collate_policy`; `value_rows` `[m]`, the indices of the values among them; and
        `label_rows` `[samples, K]`, the index of each label among the m values (m = missing).
        """
        outputs = len(self.model.schema)
        places: list[int] = []
        targets: list[int] = []
        value_of: list[int] = []  # of each place sample times K plus attribute, or -1
        for number, (item, start) in enumerate(zip(items, starts, strict=True)):
            if item is not None:
                ids, attributes = self.model.strings.encode(item["labels"].tolist())
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

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Loss:
        """Cross-entropy of `output` `[n, vocabulary / tp]`, the n tokens of the attribute strings."""
        kept = {}
        if not self.model.training:  # first: the loss works in place
            kept = {name: batch[name] for name in ("labels", "indices", "dataset")}
            kept["values"] = self._labelled_values(output, batch)
        return *cross_entropy(output, batch["targets"], self.model.card.architecture.vocab_size), kept

    def _labelled_values(self, output: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Values `[samples, K]` where there is a label, given the labels before it; NaN elsewhere."""
        if not self.levels:
            self.levels = [torch.tensor(ids, device=parallel.device()) for ids in self.model.strings.levels]
        logits = gather_from_tensor_model_parallel_region(output[batch["value_rows"]]).float()
        rows = torch.cat((logits, logits.new_zeros(1, logits.shape[1])))[batch["label_rows"]]
        raw = torch.cat([rows[:, k, ids] for k, ids in enumerate(self.levels)], dim=-1)
        return torch.where(torch.isnan(batch["labels"]), torch.nan, self.model.head.values(raw))


class ConditionedSFTTask(Task):
    """Attribute-conditioned fine-tuning (SteerLM, section 3.3).

        L = - sum_i sum_t log P(y_it | v_i, x_i, y_i,<t) / sum_i |y_i|

    x_i is the conversation up to a response, v_i its attribute string, y_i the response and its closing marker. The
    mask is the template's (`PromptTemplate.encode_policies`): prompts and attribute strings carry no loss. `collate`
    gives the places, `megatron.cross_entropy` sum and count.

    Args:
        model: the policy.
        compared: number of responses in each of `OWN` and `OTHER` (`beside` of `MegatronModel.begin`); 0 without them.
    """

    def __init__(self, model: AttributeConditionedGPT, compared: int = 0) -> None:
        super().__init__(model)
        self.compared = compared

    def collate(self, items: Sequence[Item | None], starts: Sequence[int], shape: tuple[int, int]) -> MicroBatch:
        """See `batches.collate_policy`."""
        return collate_policy(items, starts, shape)

    def loss(self, output: torch.Tensor, batch: MicroBatch) -> Loss:
        """Cross-entropy of `output` `[n, vocabulary / tp]`, the n tokens of responses and their closing markers."""
        return *cross_entropy(output, batch["targets"], self.model.card.architecture.vocab_size), {}

    def metrics(self, kept: list[dict[str, Any]]) -> dict[str, float]:
        """Loss; and with `OWN` and `OTHER` beside the validation data, `val/label_information`.

        That is how much less likely the same responses are under the labels of other responses, in nats per response:
        0 for a policy that ignores labels (`evaluate.steerability.label_information`).
        """
        found = super().metrics(kept)
        if self.compared:
            own, other = (self.model.loss_over(self.model.beside[name]) for name in (OWN, OTHER))
            found["val/label_information"] = (other - own) / self.compared
        return found

    def metric_names(self) -> list[str]:
        """The loss, and the label information where it is measured."""
        return [*super().metric_names(), *(["val/label_information"] if self.compared else [])]

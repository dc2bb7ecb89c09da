"""`steerlm train-sft`, step 3: fine-tune a language model on answers conditioned on their attributes.

It ends with the verdict whether the policy listens and obeys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from nemo_steerlm.config import TrainSftConfig
from nemo_steerlm.conversation import Conversation, read_conversations
from nemo_steerlm.data.cache import TokenCache
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.data.policy_dataset import PolicyDataset, trained_turns, with_other_labels
from nemo_steerlm.data.tokenise import draw
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.provenance import write_run_json
from nemo_steerlm.train import fit
from nemo_steerlm.train.start import start_model
from nemo_steerlm.train.tasks import OTHER, OWN, ConditionedSFTTask
from nemo_steerlm.verbs.steering import check_scorers
from nemo_steerlm.verbs.steering_check import check


def main(config: TrainSftConfig) -> None:
    """`steerlm train-sft`: fill the run folder `config.output`, print the verdict on steering."""
    if config.steering.check and config.steering.prompts:
        check_scorers(config.steering.scorers or [])
    train(config)
    check(config, config.data.train_files(), config.data.val_files())


def train(config: TrainSftConfig) -> None:
    """Fill the run folder `config.output`."""
    schema = config.attributes.require()
    data = config.data
    files, held_out = data.train_files(), data.val_files()
    parallel.start(config, config.seed)
    model = start_model(AttributeConditionedGPT, config, schema)

    def tokenised(path: str, attribute_dropout: float = 0.0, label_dropout: float = 0.0) -> PolicyDataset:
        return PolicyDataset.build(
            read_conversations(path, schema), schema, model.card.template, model.tokenizer, data.max_length,
            data.overlong, attribute_dropout, label_dropout, config.seed,
            TokenCache(path, data.cache, writer=parallel.is_rank_zero(), wait=parallel.barrier),
        )  # fmt: skip

    dropout = data.attribute_dropout, data.label_dropout
    training = Mixture([tokenised(path, *dropout) for path in files], data.weights, files)
    validation = Mixture([tokenised(path) for path in held_out], names=held_out) if held_out else None
    compared, responses = _compared(model, config, held_out)
    task = ConditionedSFTTask(model, responses)
    with contextlib.closing(model):
        best = fit.train(task, config, training, validation, compared)
    if parallel.is_rank_zero():
        report = {"train": training.report, "val": validation.report if validation else None}
        write_run_json(config.output, "train-sft", config, [*files, *held_out], schema, data=report, best=best)


def _compared(
    model: AttributeConditionedGPT, config: TrainSftConfig, files: Sequence[str]
) -> tuple[dict[str, Mixture], int]:
    """Some held-out rows with their own labels and with those of other responses; and the number of responses."""
    schema, data, template = model.schema, config.data, model.card.template
    rows = draw(
        (row for path in files for row in read_conversations(path, schema) if row.type and trained_turns(row)),
        config.steering.rows if config.steering.check else 0, config.seed,
    )  # fmt: skip
    pairs = list(zip(rows, with_other_labels(rows, config.seed)))
    texts = template.encode_policies([(row, True) for pair in pairs for row in pair], schema, model.tokenizer)
    lengths = [len(ids) for ids, _ in texts]
    pairs = [pair for pair, *two in zip(pairs, lengths[::2], lengths[1::2]) if max(two) <= data.max_length]
    if len(pairs) < 2:
        return {}, 0

    def tokenised(rows: Sequence[Conversation]) -> Mixture:
        return Mixture([PolicyDataset.build(rows, schema, template, model.tokenizer, data.max_length)])

    own, other = zip(*pairs)
    return {OWN: tokenised(own), OTHER: tokenised(other)}, sum(len(trained_turns(row)) for row in own)

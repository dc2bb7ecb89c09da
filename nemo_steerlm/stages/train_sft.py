"""Step 3: fine-tune a language model on answers that follow their attributes."""

from __future__ import annotations

import contextlib

from nemo_steerlm.config import TrainSftConfig
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data.cache import TokenCache
from nemo_steerlm.data.mixture import Mixture
from nemo_steerlm.data.policy_dataset import PolicyDataset
from nemo_steerlm.megatron import parallel
from nemo_steerlm.models.batches import collate_policy
from nemo_steerlm.models.fit import train
from nemo_steerlm.models.policy import AttributeConditionedGPT
from nemo_steerlm.models.start import start_model
from nemo_steerlm.provenance import check_attributes, write_run_json


def main(config: TrainSftConfig) -> None:
    """`steerlm train-sft`: fill the run folder `config.output`."""
    schema = config.attributes.require()
    data = config.data
    files, held_out = data.train_files(), data.val_files()
    for path in (*files, *held_out):
        check_attributes(path, schema)
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
    with contextlib.closing(model):
        best = train(model, config, training, validation, collate_policy)
    if parallel.is_rank_zero():
        report = {"train": training.report, "val": validation.report if validation else None}
        write_run_json(config.output, "train-sft", config, [*files, *held_out], schema, data=report, best=best)

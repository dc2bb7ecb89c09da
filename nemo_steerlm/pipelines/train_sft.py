"""`steerlm train-sft`: train the policy, then tell whether it listens and obeys."""

from __future__ import annotations

from nemo_steerlm.config import TrainSftConfig
from nemo_steerlm.pipelines.steering import check_scorers
from nemo_steerlm.pipelines.steering_check import check
from nemo_steerlm.stages import train_sft


def main(config: TrainSftConfig) -> None:
    """Fill the run folder `config.output`, print the verdict on steering."""
    if config.steering.check and config.steering.prompts:
        check_scorers(config.steering.scorers or [])
    train_sft.main(config)
    check(config, config.data.train_files(), config.data.val_files())

"""Training: loop, optimizer, loss and loggers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from omegaconf import MISSING

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.config.compute import ComputeConfig, InProcesses
from nemo_steerlm.config.data import DataConfig
from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.errors import ConfigError, suggest


@dataclass(kw_only=True)
class TrainerConfig(ComputeConfig):
    """Steps, batches, validation, checkpoints."""

    max_steps: int | None = option(None, "optimizer steps; this or max_epochs must be given", least=1)
    max_epochs: float | None = option(None, "passes over the data, where max_steps is null", least=0.0)
    max_time: str | None = option(
        None, "time after which the run saves and ends, HH:MM:SS or DD:HH:MM:SS from the start of its process"
    )
    global_batch_size: int = option(MISSING, "samples an optimizer step, over all processes", least=1, example="128")
    micro_batch_size: int = option(
        MISSING, "samples a process handles at once; a preference pair is one", least=1, example="1"
    )
    val_every: int | None = option(None, "optimizer steps between validations; null = only at the end", least=1)
    val_batches: int | None = option(None, "global batches a validation; null = all", least=1)
    best_metric: str | None = option(
        None, "model/ holds the best step by this metric, e.g. val/loss, val/quality/pearson; null = the last step"
    )
    checkpoint_every: int | None = option(None, "optimizer steps between checkpoints; null = 15 minutes", least=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept", least=1)
    checkpoint_local_dir: str | None = option(
        None, "folder on each node's own disk: checkpoints are written there and copied to OUTPUT in the background"
    )
    async_checkpoint: bool = option(False, "write checkpoints in the background, from copies in CPU memory")
    recompute: str = option(
        "none", "activations recomputed in the backward pass: of attention, or of whole layers",
        choices=("none", "selective", "full"),
    )  # fmt: skip
    max_bad_steps: int = option(
        3, "steps in a row, each skipped for a loss or gradient norm that is not finite, that end the run", least=1
    )
    log_every: int = option(1, "optimizer steps between logged lines", least=1)
    progress_bar: bool = option(True, "show steps, speed and time left")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the training ends."""
        super().validate(prefix)
        if self.max_steps is None and not self.max_epochs:
            raise ConfigError(
                "trainer.max_steps is missing; give it or trainer.max_epochs, e.g. trainer.max_steps=800"
            )
        self.max_seconds()

    def max_seconds(self) -> float | None:
        """`max_time` in seconds; DD-HH:MM:SS, as SLURM writes it, is the same as DD:HH:MM:SS.

        Raises:
            ConfigError: it is written in another way. YAML reads 12:00:00 without quotes as a number.
        """
        if self.max_time is None:
            return None
        found = re.fullmatch(r"(?:(\d+)[:-])?(\d+):([0-5]?\d):([0-5]?\d)", self.max_time)
        if found is None:
            raise ConfigError(
                f"trainer.max_time={self.max_time}: expected HH:MM:SS or DD:HH:MM:SS, in a YAML file in quotes: "
                '"04:00:00"'
            )
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds


#: Default peak learning rate of a fine-tuning. All weights: between the 5e-6 of SteerLM's and HelpSteer's
#: 13B models and TRL's 2e-5, near NeMo-Aligner's 9e-6. Adapters: ten times as much, which is TRL's advice.
FULL_RATE, LORA_RATE = 1e-5, 1e-4


@dataclass(kw_only=True)
class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    lr: float | None = option(
        None, f"peak learning rate; null = {FULL_RATE:g} for full fine-tuning, {LORA_RATE:g} for LoRA; random weights "
        "and a head alone need one", least=0.0,
    )  # fmt: skip
    min_lr: float = option(0.0, "learning rate at the end of a cosine schedule", least=0.0)
    beta1: float = option(0.9, "decay of the first moment", least=0.0, below=1.0)
    beta2: float = option(0.98, "decay of the second moment", least=0.0, below=1.0)
    eps: float = option(1e-8, "added to the denominator", least=1e-20)
    weight_decay: float = option(0.01, "decoupled decay; none on norms and biases", least=0.0)
    clip_grad: float = option(1.0, "largest gradient norm; 0 = no clipping", least=0.0)
    schedule: str = option("constant", "learning rate after warm-up", choices=("constant", "cosine"))
    warmup_steps: int = option(10, "optimizer steps of linear warm-up", least=0)
    distributed: bool = option(True, "shard the optimizer's state over data-parallel ranks")
    ema_decay: float | None = option(
        None, "write the moving average of the weights to model/; decay a step, e.g. 0.999", least=0.0, below=1.0
    )
    overlap: bool = option(False, "overlap gradient reduction with the backward pass")


@dataclass(kw_only=True)
class LossConfig(Settings):
    """The loss of a regressor."""

    kind: str | None = option(
        None, "error of a label; null = the head's own: mse, or cross-entropy over levels; none = pairs alone",
        choices=("mse", "huber", "none"),
    )  # fmt: skip
    huber_delta: float = option(1.0, "error at which Huber's loss turns from square to linear", least=1e-9)
    weights: dict[str, float] = option(
        dict, "weight of an attribute's labels, else 1: loss.weights.humor=2", least=0.0
    )
    balance: str | None = option(
        None, "divide weights by the number of labels, so that each attribute weighs the same",
        choices=("inverse_frequency",),
    )  # fmt: skip
    smoothing: float = option(0.0, "pseudo-annotators who give the mean, for labels with a label_count", least=0.0)
    preference: str = option(
        "none", "Bradley-Terry loss of rows that share a pair; margin and scaled use its strength",
        choices=("none", "regular", "margin", "scaled"),
    )  # fmt: skip
    preference_attribute: str | None = option(None, "attribute that is higher in the preferred response")
    preference_weight: float = option(1.0, "weight of a pair, where a label weighs 1", least=0.0)

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that something is left to train on."""
        super().validate(prefix)
        if self.kind == "none" and self.preference == "none":
            raise ConfigError("loss.kind=none leaves nothing to train on; choose another, or loss.preference=scaled")

    def check_names(self, schema: AttributeSchema) -> None:
        """Refuse an attribute that is not in the schema, and preferences without one (ConfigError)."""
        for name in self.weights:
            if name not in schema:
                hint = suggest(name, schema.names)
                raise ConfigError(f"loss.weights.{name}: no such attribute{hint} (known: {', '.join(schema.names)})")
        if self.preference == "none":
            return
        preferred, known = self.preference_attribute, f"one of {', '.join(schema.names)}"
        if preferred is None:
            raise ConfigError(f"loss.preference={self.preference} needs loss.preference_attribute={known}")
        if preferred not in schema:
            hint = suggest(preferred, schema.names)
            raise ConfigError(f"loss.preference_attribute={preferred}: no such attribute{hint}; expected {known}")


@dataclass(kw_only=True)
class LoggingConfig(Settings):
    """Loggers beside metrics.jsonl, which is always written."""

    tensorboard: bool = option(True, "write TensorBoard files to OUTPUT/logs")
    wandb: bool = option(False, "log to Weights & Biases; needs the extra nemo_steerlm[wandb]")
    wandb_project: str = option("nemo_steerlm", "W&B project")
    wandb_offline: bool = option(True, "keep W&B files local; `wandb sync` sends them later")
    straggler_every: int | None = option(
        None, "optimizer steps between reports of the slowest rank; null = none, and nothing is measured", least=1
    )
    mlflow: bool = option(False, "log to MLflow; needs the extra nemo_steerlm[mlflow]")
    mlflow_experiment: str = option("nemo_steerlm", "MLflow experiment")
    mlflow_uri: str | None = option(
        None, "MLflow server or store, e.g. http://host:5000; null = MLFLOW_TRACKING_URI, else OUTPUT/logs/mlflow.db"
    )
    name: str | None = option(None, "name of the run; null = that of the output folder")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the loggers are installed."""
        super().validate(prefix)
        for name in ("wandb", "mlflow"):
            if getattr(self, name) and find_spec(name) is None:
                raise ConfigError(f"logging.{name}=true needs the package {name}: pip install 'nemo_steerlm[{name}]'")


class Training(InProcesses):
    """Checks of a verb that trains."""

    trainer: TrainerConfig
    data: DataConfig

    def validate(self, prefix: str = "") -> None:
        """As `InProcesses.validate`, and that the data-parallel ranks share a global batch equally."""
        super().validate(prefix)
        trainer = self.trainer
        if trainer.best_metric is not None and self.data.val is None:
            raise ConfigError(f"trainer.best_metric={trainer.best_metric} needs validation data: give data.val=FILE")
        self.check_batch()

    def check_batch(self) -> None:
        """Refuse a global batch that the data-parallel ranks cannot share equally (ConfigError)."""
        trainer, parallel = self.trainer, self.parallel
        if self.data.packing:  # the micro-batches follow from the data
            return
        ranks = trainer.num_nodes * trainer.devices // (parallel.tensor * parallel.pipeline)
        share = trainer.micro_batch_size * ranks
        if trainer.global_batch_size % share:
            raise ConfigError(
                f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size="
                f"{trainer.micro_batch_size} x {ranks} data-parallel rank{'s' * (ranks > 1)} = {share}"
            )
        microbatches = trainer.global_batch_size // share
        if parallel.virtual_pipeline and microbatches % parallel.pipeline:
            raise ConfigError(
                f"parallel.virtual_pipeline needs micro-batches in multiples of parallel.pipeline={parallel.pipeline},"
                f" found {microbatches}: raise trainer.global_batch_size or lower trainer.micro_batch_size"
            )

"""Every setting of every verb: typed, with help text, default and range. conf/ holds values for these fields only.

One dataclass a verb (`TrainSftConfig`, ...), built from the shared ones above it. `nemo_steerlm.compose` turns a
command line into one of them and checks the ranges given here; Python code builds them itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError, suggest
from nemo_steerlm.template import PromptTemplate


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    example: str = "",
) -> Any:
    """A dataclass field with what `--help` shows and `compose` checks.

    Args:
        default: the default; a class or function makes a new one each time; MISSING = the user must give it.
        text: one line of help, with the unit.
        choices: the strings allowed.
        least: smallest number allowed.
        most: largest number allowed.
        example: a value to show where the user left a mandatory one out.
    """
    metadata = {"help": text, "choices": choices, "least": least, "most": most, "example": example}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# -- shared parts -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies."""

    factor: float = option(8.0, "how much longer the context became", least=1.0)
    low_freq_factor: float = option(1.0, "wavelengths above original / this are scaled in full")
    high_freq_factor: float = option(4.0, "wavelengths below original / this are left alone")
    original_max_position_embeddings: int = option(8192, "context length before scaling, tokens", least=1)


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")


@dataclass(kw_only=True)
class Architecture:
    """Shape of a network: rotary positions, grouped-query attention, what its family has (megatron/families.py)."""

    family: str = option("llama", "whose network: norms, activation, biases", choices=FAMILIES)
    num_layers: int = option(2, "transformer layers", least=1)
    hidden_size: int = option(128, "width of the residual stream", least=1)
    ffn_hidden_size: int = option(384, "width inside the feed-forward block", least=1)
    num_attention_heads: int = option(4, "query heads", least=1)
    num_query_groups: int | None = option(None, "key/value heads; null = as many as query heads", least=1)
    head_dim: int | None = option(None, "width of a head; null = hidden_size / num_attention_heads", least=1)
    vocab_size: int = option(0, "true vocabulary size; 0 = that of the tokenizer", least=0)
    max_position_embeddings: int = option(4096, "longest sequence the model is meant for, tokens", least=1)
    norm_epsilon: float = option(1e-5, "epsilon of the norms")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    rotary_percent: float = option(1.0, "share of a head that is rotated; Nemotron: 0.5", least=0.0, most=1.0)
    rope_scaling: RopeScaling | None = option(None, "Llama 3.1 frequency scaling; null = none")
    tie_word_embeddings: bool = option(False, "one matrix for embedding and output")
    init_std: float = option(0.02, "standard deviation of random weights", least=0.0)
    hidden_dropout: float = option(0.0, "dropout after attention and feed-forward", least=0.0, most=1.0)
    attention_dropout: float = option(0.0, "dropout on attention weights", least=0.0, most=1.0)
    pad_vocab_to: int = option(128, "rows of the embedding are padded to a multiple of this", least=1)


LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): W stays as it is, W + alpha / rank * B A is used."""

    rank: int = option(0, "rank of the adapters; 0 = none, all weights are trained", least=0)
    alpha: float = option(32.0, "adapters are scaled by alpha / rank", least=0.0)
    dropout: float = option(0.0, "dropout on what the adapters read", least=0.0, most=1.0)
    targets: list[str] = option(lambda: list(LORA_TARGETS), f"linears that get one, of {', '.join(LORA_TARGETS)}")


@dataclass(kw_only=True)
class ModelConfig:
    """Where the weights come from and which of them are trained."""

    init: str | None = option(None, "model folder or Hugging Face folder to start from; null = random weights")
    tokenizer: str | None = option(None, "Hugging Face folder or SentencePiece file; needed for random weights")
    architecture: Architecture | None = option(None, "shape for random weights; model=llama_tiny and so on fill it")
    lora: LoRAConfig = option(LoRAConfig, "low-rank adapters")
    freeze: str = option("none", "trunk = train a regressor's head alone", choices=("none", "trunk"))


HEADS = ("regression", "ordinal", "distribution", "generative")
POOLINGS = ("last", "mean")


@dataclass(kw_only=True)
class RegressorModelConfig(ModelConfig):
    """Where the regressor's weights come from."""

    head_init: str | None = option(
        None, "mean = a new head starts by predicting the labels' means or shares; null = near zero", choices=("mean",)
    )
    pooling: str | None = option(
        None, "what the head reads: the text's last token or all of them; null = as model.init, else last",
        choices=POOLINGS,
    )  # fmt: skip


@dataclass(kw_only=True)
class AttributeOptions:
    """One attribute in `attributes.schema`; what is null stays as in the preset."""

    low: int | None = option(None, "lowest value")
    high: int | None = option(None, "highest value")
    default: int | None = option(None, "value at inference where the user gives none")
    description: str | None = option(None, "what it measures")


@dataclass(kw_only=True)
class AttributesConfig:
    """The attribute schema: a preset or YAML file, changed or extended by `schema`."""

    preset: str | None = option(None, "helpsteer, helpsteer2, oasst_0_9, ultrafeedback, synthetic, or a YAML file")
    schema: dict[str, AttributeOptions] = option(dict, "more attributes, or changes: attributes.schema.humor.high=9")

    def load(self) -> AttributeSchema | None:
        """The schema these settings describe, None where they name none.

        Raises:
            ConfigError: no such preset or file, or a range that makes no sense.
        """
        if self.preset is None and not self.schema:
            return None
        merged = AttributeSchema.load(self.preset).to_dict() if self.preset is not None else {}
        for name, options in self.schema.items():
            given = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
            merged[name] = {**merged.get(name, {}), **given}
        return AttributeSchema.load(merged)

    def require(self) -> AttributeSchema:
        """As `load`, for verbs that cannot do without.

        Raises:
            ConfigError: no schema is given.
        """
        schema = self.load()
        if schema is None:
            raise ConfigError(
                "attributes is missing; choose a preset (attributes=helpsteer) or a file (attributes=mine.yaml)"
            )
        return schema


@dataclass(kw_only=True)
class TemplateConfig:
    """Strings of the prompt; see `nemo_steerlm.template.PromptTemplate`."""

    system_start: str = option(PromptTemplate.system_start, "opens the prompt")
    turn_start: str = option(PromptTemplate.turn_start, "opens a turn; generation stops at it")
    label_start: str = option(PromptTemplate.label_start, "opens a label line")
    end_of_name: str = option(PromptTemplate.end_of_name, "ends a speaker's name and a label line")
    end_of_turn: str = option(PromptTemplate.end_of_turn, "ends the system prompt and a turn")
    system_name: str = option(PromptTemplate.system_name, "name in the first line")
    user: str = option(PromptTemplate.user, "speaker name of people")
    assistant: str = option(PromptTemplate.assistant, "speaker name of the model")

    def build(self) -> PromptTemplate:
        """The template itself (raises ConfigError for strings that clash)."""
        return PromptTemplate(**dataclasses.asdict(self))


@dataclass(kw_only=True)
class ParallelConfig:
    """How a model is cut; what is left of the processes is data-parallel."""

    tensor: int = option(1, "tensor-parallel size", least=1)
    pipeline: int = option(1, "pipeline-parallel size", least=1)
    virtual_pipeline: int | None = option(None, "model chunks a pipeline stage (interleaved schedule)", least=2)
    sequence: bool = option(False, "also split norms and dropout along the sequence; needs tensor > 1")
    context: int = option(1, "processes that share each sequence; above 1 needs Transformer Engine", least=1)


@dataclass(kw_only=True)
class ComputeConfig:
    """Processes and number format."""

    devices: int = option(1, "processes on each node, one per GPU (or per share of the CPU)", least=1)
    num_nodes: int = option(1, "machines; more than one needs torchrun or srun", least=1)
    accelerator: str = option("auto", "where to run", choices=("auto", "cpu", "gpu"))
    precision: str = option(
        "fp32", "number format of the computation; fp8 needs Transformer Engine", choices=("fp32", "bf16", "fp8")
    )


@dataclass(kw_only=True)
class TrainerConfig(ComputeConfig):
    """Steps, batches, validation, checkpoints."""

    max_steps: int | None = option(None, "optimizer steps; this or max_epochs must be given", least=1)
    max_epochs: float | None = option(None, "passes over the data, where max_steps is null", least=0.0)
    global_batch_size: int = option(MISSING, "samples an optimizer step, over all processes", least=1, example="128")
    micro_batch_size: int = option(
        MISSING, "samples a process handles at once; a preference pair is one", least=1, example="1"
    )
    val_every: int | None = option(None, "optimizer steps between validations; null = only at the end", least=1)
    val_batches: int | None = option(None, "global batches a validation; null = all", least=1)
    best_metric: str | None = option(
        None, "model/ holds the step with the best of this, e.g. val/loss, val/quality/pearson; null = the last step"
    )
    checkpoint_every: int | None = option(None, "optimizer steps between checkpoints; null = only at the end", least=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept", least=1)
    async_checkpoint: bool = option(False, "write checkpoints in the background, from copies in CPU memory")
    recompute: str = option(
        "none", "activations computed again in the backward pass: of attention, or of whole layers",
        choices=("none", "selective", "full"),
    )  # fmt: skip
    log_every: int = option(1, "optimizer steps between logged lines", least=1)
    progress_bar: bool = option(True, "show steps, speed and time left")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = option(MISSING, "peak learning rate", least=0.0, example="5e-6")
    min_lr: float = option(0.0, "learning rate at the end of a cosine schedule", least=0.0)
    beta1: float = option(0.9, "decay of the first moment", least=0.0, most=1.0)
    beta2: float = option(0.98, "decay of the second moment", least=0.0, most=1.0)
    eps: float = option(1e-8, "added to the denominator", least=0.0)
    weight_decay: float = option(0.01, "decoupled decay; none on norms and biases", least=0.0)
    clip_grad: float = option(1.0, "largest gradient norm; 0 = no clipping", least=0.0)
    schedule: str = option("constant", "learning rate after warm-up", choices=("constant", "cosine"))
    warmup_steps: int = option(10, "optimizer steps of linear warm-up", least=0)
    distributed: bool = option(True, "shard the optimizer's state over data-parallel ranks")
    ema_decay: float | None = option(
        None, "write the moving average of the weights to model/; decay a step, e.g. 0.999", least=0.0, most=1.0
    )
    overlap: bool = option(False, "overlap gradient reduction with the backward pass")


@dataclass(kw_only=True)
class LossConfig:
    """What a regressor is trained to minimise."""

    kind: str | None = option(
        None, "error of a label; null = the head's own: mse, or cross-entropy over levels; none = pairs alone",
        choices=("mse", "huber", "none"),
    )  # fmt: skip
    huber_delta: float = option(1.0, "error at which Huber's loss turns from square to linear", least=1e-9)
    weights: dict[str, float] = option(dict, "weight of an attribute's labels, else 1: loss.weights.humor=2")
    balance: str | None = option(
        None, "divide weights by the number of labels, so that each attribute weighs the same",
        choices=("inverse_frequency",),
    )  # fmt: skip
    smoothing: float = option(0.0, "annotators giving the mean, mixed into labels with a label_count", least=0.0)
    preference: str = option(
        "none", "Bradley-Terry loss of rows that share a pair; margin and scaled use its strength",
        choices=("none", "regular", "margin", "scaled"),
    )  # fmt: skip
    preference_attribute: str | None = option(None, "attribute that is higher in the preferred response")
    preference_weight: float = option(1.0, "weight of a pair, where a label weighs 1", least=0.0)


@dataclass(kw_only=True)
class LoggingConfig:
    """Loggers beside metrics.jsonl, which is always written."""

    tensorboard: bool = option(True, "write TensorBoard files to OUTPUT/logs")
    wandb: bool = option(False, "log to Weights & Biases; needs the extra nemo_steerlm[wandb]")
    wandb_project: str = option("nemo_steerlm", "W&B project")
    wandb_offline: bool = option(True, "keep W&B files local; `wandb sync` sends them later")
    name: str | None = option(None, "name of the run; null = that of the output folder")


def _paths(key: str, value: Any) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{key}={value}: expected a file, or a list of files: {key}=[one.jsonl,two.jsonl]")
    return list(paths)


_OVERLONG = ("truncate_history", "drop", "error")


@dataclass(kw_only=True)
class DataConfig:
    """Training data."""

    train: Any = option(MISSING, "conversations (.jsonl or .jsonl.gz), or [ONE,TWO]", example="data/train.jsonl")
    val: Any = option(None, "conversations to validate on, or [ONE,TWO]; null = no validation")
    weights: list[float] | None = option(
        None, "how often an epoch draws the rows of each file of data.train, e.g. [1,0.5]; null = once"
    )
    max_length: int = option(4096, "longest sample, tokens", least=2)
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=_OVERLONG)
    packing: bool = option(False, "put several samples into a row instead of padding; micro_batch_size is then unused")
    pack_length: int | None = option(None, "longest packed row, tokens; null = max_length", least=2)
    cache: str | None = option(None, "folder of tokenised data; null = .steerlm-cache beside the data")

    def train_files(self) -> list[str]:
        """The files of `train`.

        Raises:
            ConfigError: no file, or `weights` that do not belong to the files one by one.
        """
        files = _paths("data.train", self.train)
        if self.weights is not None and (len(self.weights) != len(files) or min(self.weights, default=0) <= 0):
            raise ConfigError(
                f"data.weights={self.weights}: expected one number above 0 for each of the {len(files)} files of "
                "data.train"
            )
        return files

    def val_files(self) -> list[str]:
        """The files of `val`, none for null (raises ConfigError for what is no path)."""
        return [] if self.val is None else _paths("data.val", self.val)

    def row_length(self) -> int | None:
        """Most tokens of a packed row, None without packing.

        Raises:
            ConfigError: a sample may not fit into a row.
        """
        if self.packing and self.pack_length is not None and self.pack_length < self.max_length:
            raise ConfigError(
                f"data.pack_length={self.pack_length} is smaller than data.max_length={self.max_length}: a sample must"
                " fit into a row; raise data.pack_length or lower data.max_length"
            )
        return (self.pack_length or self.max_length) if self.packing else None


@dataclass(kw_only=True)
class PolicyDataConfig(DataConfig):
    """Training data of a policy."""

    attribute_dropout: float = option(0.0, "share of samples that see a part of their label", least=0.0, most=1.0)
    label_dropout: float = option(0.0, "share of samples that see no label line", least=0.0, most=1.0)


@dataclass(kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    responses: int = option(4, "responses a prompt", least=1)
    top_k: int = option(50, "draw among the k likeliest tokens; 0 = all", least=0)
    top_p: float | None = option(None, "draw among the likeliest of this total probability", least=0.0, most=1.0)
    temperature: float = option(1.0, "0 = always the likeliest token", least=0.0)
    max_new_tokens: int = option(512, "longest response, tokens", least=1)
    batch_size: int = option(64, "responses generated at once", least=1)


# -- one a verb -------------------------------------------------------------------------------------------------------


PREPARE_SOURCES = (
    "oasst", "helpsteer", "helpsteer2", "helpsteer2_preference", "helpsteer3", "hh_rlhf", "ultrafeedback", "self_id",
    "messages", "steerlm", "table", "synthetic",
)  # fmt: skip


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of `steerlm prepare`."""

    source: str = option(MISSING, "kind of dataset", choices=PREPARE_SOURCES, example="oasst")
    input: str | None = option(None, "file or folder, or with revision a dataset on the hub; synthetic needs none")
    revision: str | None = option(None, "commit, tag or branch of the dataset on the hub")
    output: str | None = option(None, "folder for train.jsonl, val.jsonl, report.json, report.html")
    check: bool = option(False, "read everything and report, but write nothing")
    dataset: str | None = option(None, "name that every row carries; null = the source's")
    columns: dict[str, str] = option(dict, "source=table: {prompt:COLUMN,response:COLUMN,quality:COLUMN,...}")
    attributes: AttributesConfig = option(AttributesConfig, "attribute schema; null = the source's own")
    val_fraction: float | None = option(0.05, "share held out; null = the dataset's own split", least=0.0, most=1.0)
    seed: int = option(10, "seed of the split, and of synthetic data")
    languages: list[str] | None = option(None, "keep only these, e.g. languages=[en,de]; null = all")
    dedupe: bool = option(True, "drop repeated conversations")
    tokenizer: str | None = option(None, "the report counts lengths in its tokens; null = characters")
    recipe: str = option(
        "default", "nemo_aligner = the reference's files byte for byte", choices=("default", "nemo_aligner")
    )


@dataclass(kw_only=True)
class ImportConfig:
    """Settings of `steerlm import`."""

    input: str = option(MISSING, "Hugging Face folder, or a llama2.c .bin file", example="Llama-3.1-8B")
    output: str = option(MISSING, "model folder to write", example="outputs/base")
    tokenizer: str | None = option(None, "Hugging Face folder or SentencePiece file; null = the input's own")
    attributes: AttributesConfig = option(AttributesConfig, "names of a sequence classifier's outputs")
    template: TemplateConfig = option(TemplateConfig, "prompt of a sequence classifier of others")


@dataclass(kw_only=True)
class ExportConfig:
    """Settings of `steerlm export`."""

    checkpoint: str = option(MISSING, "model folder", example="outputs/policy/model")
    output: str = option(MISSING, "folder to write", example="outputs/policy-hf")
    scalar: dict[str, float] = option(dict, "one weighted sum of a regressor's attributes: scalar.helpfulness=0.65")
    format: str = option("hf", "hf = safetensors that transformers loads", choices=("hf",))
    dtype: str | None = option(
        None, "number format of the weights; null = as trained", choices=("float32", "bfloat16", "float16")
    )


@dataclass(kw_only=True)
class TrainConfig:
    """What both trainings share."""

    output: str = option(MISSING, "run folder", example="outputs/run")
    attributes: AttributesConfig = option(AttributesConfig, "attribute schema")
    template: TemplateConfig = option(TemplateConfig, "strings of the prompt")
    trainer: TrainerConfig = option(TrainerConfig, "training loop")
    parallel: ParallelConfig = option(ParallelConfig, "layout")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimizer")
    logging: LoggingConfig = option(LoggingConfig, "loggers")
    seed: int = option(1234, "seed of weights, data order and dropout")
    resume: bool = option(True, "go on from the newest complete checkpoint in the run folder")


@dataclass(kw_only=True)
class TrainRegressorConfig(TrainConfig):
    """Settings of `steerlm train-regressor`."""

    data: DataConfig = option(DataConfig, "training data")
    model: RegressorModelConfig = option(RegressorModelConfig, "model")
    head: str | None = option(
        None, "a value as a number, a distribution over levels, or text; null = as model.init, else regression",
        choices=HEADS,
    )  # fmt: skip
    loss: LossConfig = option(LossConfig, "loss")


@dataclass(kw_only=True)
class TrainSftConfig(TrainConfig):
    """Settings of `steerlm train-sft`."""

    data: PolicyDataConfig = option(PolicyDataConfig, "training data")
    model: ModelConfig = option(ModelConfig, "model")


def check_trainable(config: TrainRegressorConfig | TrainSftConfig) -> None:
    """Refuse a choice of trained weights that makes no sense.

    Raises:
        ConfigError: an unknown LoRA target, nothing to adapt, or a trunk that cannot be frozen.
    """
    model, lora = config.model, config.model.lora
    for name in lora.targets:
        if name not in LORA_TARGETS:
            raise ConfigError(
                f"model.lora.targets: no linear is called {name}{suggest(name, LORA_TARGETS) or '.'} "
                f"There are {', '.join(LORA_TARGETS)}"
            )
    frozen = f"model.lora.rank={lora.rank}" if lora.rank else f"model.freeze={model.freeze}"
    if lora.rank and not lora.targets:
        raise ConfigError(f"{frozen} with an empty model.lora.targets trains nothing; name at least one linear")
    if lora.rank and model.freeze != "none":
        raise ConfigError(f"{frozen} trains adapters in the trunk that model.freeze={model.freeze} freezes; give one")
    if model.freeze == "trunk" and isinstance(config, TrainSftConfig):
        raise ConfigError("model.freeze=trunk: a policy has no head to train alone; use model.lora.rank=16")
    if model.freeze == "trunk" and config.parallel.pipeline > 1:
        raise ConfigError(
            f"model.freeze=trunk leaves nothing to train on the first of parallel.pipeline={config.parallel.pipeline} "
            "stages; use parallel.tensor instead"
        )
    if model.init is None and (lora.rank or model.freeze != "none"):
        raise ConfigError(f"{frozen} keeps the weights it starts from: give them with model.init=FOLDER")


@dataclass(kw_only=True)
class AnnotateConfig:
    """Settings of `steerlm annotate`."""

    checkpoint: str = option(MISSING, "model folder of a regressor", example="outputs/regressor/model")
    input: str = option(MISSING, "conversations", example="data/train.jsonl")
    output: str = option(MISSING, "labelled conversations", example="outputs/labelled.jsonl")
    turns: str = option("all", "assistant turns to label", choices=("all", "labelled", "missing"))
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=_OVERLONG)
    max_length: int | None = option(None, "longest sample, tokens; null = the model's", least=2)
    batch_tokens: int | None = option(None, "tokens a forward pass; null = 16384 on a GPU, 2048 on a CPU", least=1)
    part_size: int = option(1024, "conversations a part file: what a kill loses at most", least=1)
    calibrated: bool = option(True, "apply the correction stored with the model, if there is one")
    distributions: bool = option(False, "also write the probability of every level; not with head=regression")
    shards: str | None = option(None, "i/n: do this share of the parts, i from 0; the last share to end joins all")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class SampleConfig(SamplingConfig):
    """Settings of `steerlm sample` (step 4a)."""

    checkpoint: str = option(MISSING, "model folder of a policy", example="outputs/policy/model")
    prompts: str = option(MISSING, "conversations whose user turns are answered", example="data/train.jsonl")
    annotated: str = option(
        MISSING, "data whose observed attribute combinations are drawn from", example="outputs/labelled.jsonl"
    )
    target: list[str] = option(MISSING, "attributes held at their maximum", example="[quality]")
    output: str = option(MISSING, "responses", example="outputs/responses.jsonl")
    engine: str = option("megatron", "what generates", choices=("megatron",))
    part_size: int = option(256, "prompts a part file: what a kill loses at most", least=1)
    seed: int = option(1234, "seed of combinations and responses")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class BootstrapDataConfig(PolicyDataConfig):
    """Data of `steerlm bootstrap`; `train` is the annotated data the policy was trained on."""

    train: str = option(MISSING, "conversations (.jsonl or .jsonl.gz)", example="data/train.jsonl")
    val: str | None = option(None, "conversations to validate on; null = no validation")
    prompts: str | None = option(None, "conversations to answer; null = those of data.train")
    change_prompts: str | None = option(None, "held-out conversations the change is measured on; null = data.val")


@dataclass(kw_only=True)
class BootstrapConfig:
    """Settings of `steerlm bootstrap` (step 4)."""

    policy: str = option(MISSING, "model folder of the policy", example="outputs/policy/model")
    regressor: str = option(MISSING, "model folder of the regressor", example="outputs/regressor/model")
    output: str = option(MISSING, "run folder", example="outputs/bootstrap")
    target: list[str] = option(MISSING, "attributes held at their maximum", example="[quality]")
    data: BootstrapDataConfig = option(BootstrapDataConfig, "data")
    rounds: int = option(1, "rounds of sampling and training", least=1)
    keep_fraction: float = option(
        0.5, "share of the prompts whose best response is kept, best predicted targets first", least=0.0, most=1.0
    )
    replay: float = option(1.0, "original rows mixed in for each kept response", least=0.0)
    control: bool = option(False, "also train as many steps on the original data alone, and report that change")
    batch_tokens: int | None = option(None, "tokens a forward pass of the regressor, as annotate's", least=1)
    sampling: SamplingConfig = option(SamplingConfig, "how responses are drawn")
    trainer: TrainerConfig = option(TrainerConfig, "training loop")
    parallel: ParallelConfig = option(ParallelConfig, "layout")
    optimizer: OptimizerConfig = option(OptimizerConfig, "optimizer")
    logging: LoggingConfig = option(LoggingConfig, "loggers")
    seed: int = option(1234, "seed of everything drawn")
    resume: bool = option(True, "skip what the run folder holds already")


@dataclass(kw_only=True)
class PreferenceConfig:
    """Settings of `steerlm evaluate task=preference`."""

    layout: str = option(
        "auto", "form of the input; auto = told from its keys",
        choices=("auto", "hh", "conversations", "rewardbench", "rewardbench2", "rm_bench"),
    )  # fmt: skip
    weights: dict[str, float] = option(dict, "one score from attributes: preference.weights={helpfulness: 0.65}")
    preset: str | None = option(
        None, "published weights, on HelpSteer2's attributes", choices=("nemotron_4_340b", "llama3_70b")
    )
    fit: str | None = option(None, "held-out pairs to fit the weights on; never those of the input")
    floor_train: str | None = option(None, "held-out pairs for the TF-IDF floor; null = cross-fit on the input")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of `steerlm evaluate`."""

    task: str = option(
        MISSING, "what to measure", choices=("regressor", "preference", "label_noise"), example="regressor"
    )
    checkpoint: str | None = option(
        None, "model folder of a regressor; label_noise does without where the rows hold its predictions"
    )
    input: Any = option(
        MISSING, "conversations with human labels, a file or [ONE,TWO]; preferences", example="data/val.jsonl"
    )
    output: str = option(MISSING, "folder for report.json, report.html and pictures", example="outputs/evaluation")
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=_OVERLONG)
    max_length: int | None = option(None, "longest sample, tokens; null = the model's", least=2)
    batch_tokens: int | None = option(None, "tokens a forward pass, as annotate's", least=1)
    seed: int = option(0, "seed of the bootstrap intervals")
    resamples: int = option(1000, "resamples for the intervals; 0 = none; task=preference: always 1000", least=0)
    calibrate: str | None = option(
        None, "fit a correction on the input and store it with the model; temperature: of a distribution",
        choices=("isotonic", "linear", "temperature"),
    )  # fmt: skip
    preference: PreferenceConfig = option(PreferenceConfig, "of task=preference")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")

    def inputs(self) -> list[str]:
        """The files of `input`.

        Raises:
            ConfigError: neither a file name nor a list of them.
        """
        files = [self.input] if isinstance(self.input, str) else self.input
        if not isinstance(files, (list, tuple)) or not files or not all(isinstance(one, str) for one in files):
            raise ConfigError(f"input={self.input!r:.80}: expected a file, or a list: input=[a.jsonl,b.jsonl]")
        return list(files)


@dataclass(kw_only=True)
class GenerateConfig:
    """Settings of `steerlm generate`."""

    checkpoint: str = option(MISSING, "model folder of a policy", example="outputs/policy/model")
    prompt: str = option(MISSING, "what the user says", example="'Name a good book.'")
    system: str | None = option(None, "system prompt; null = the default one")
    attributes: dict[str, float] = option(dict, "what to steer: attributes.humor=4")
    temperature: float = option(0.0, "0 = always the likeliest token", least=0.0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0 = all", least=0)
    top_p: float = option(1.0, "draw among the likeliest of this total probability", least=0.0, most=1.0)
    max_new_tokens: int = option(256, "longest response, tokens", least=1)
    seed: int = option(1234, "seed of the draw")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class QuickstartRecipe:
    """Sizes of the quickstart, fixed on other seeds than those it is judged on."""

    train_rows: int = option(8000, "dialogues with human labels, for the regressor", least=1)
    unlabelled_rows: int = option(6000, "dialogues to annotate, for the policy", least=1)
    test_rows: int = option(600, "dialogues the regressor is judged on", least=1)
    vocab_size: int = option(1536, "tokens, before those for attribute values", least=300)
    batch_size: int = option(32, "samples an optimizer step", least=1)
    regressor_steps: int = option(450, "optimizer steps of the regressor", least=1)
    regressor_lr: float = option(4e-3, "its peak learning rate", least=0.0)
    policy_steps: int = option(500, "optimizer steps of the policy", least=1)
    policy_lr: float = option(3e-3, "its peak learning rate", least=0.0)
    steer_prompts: int = option(40, "prompts a level and attribute when steering is measured", least=1)
    temperature: float = option(0.85, "of every draw", least=0.0)
    bootstrap_prompts: int = option(400, "prompts answered in step 4", least=1)
    bootstrap_responses: int = option(4, "responses a prompt in step 4", least=1)
    bootstrap_keep: float = option(0.5, "share of the prompts whose best response is kept", least=0.0, most=1.0)
    bootstrap_replay: float = option(1.0, "original rows for each kept response", least=0.0)
    bootstrap_steps: int = option(60, "optimizer steps of step 4", least=1)
    bootstrap_lr: float = option(1e-3, "its peak learning rate", least=0.0)
    change_prompts: int = option(300, "held-out prompts the gain is measured on", least=1)


@dataclass(kw_only=True)
class QuickstartConfig:
    """Settings of `steerlm quickstart`."""

    output: str = option("outputs/quickstart", "folder of data, models and report")
    seed: int = option(0, "seed of everything: world, weights, samples")
    compare_labels: bool = option(False, "also train policies on no, human and permuted labels")
    recipe: QuickstartRecipe = option(QuickstartRecipe, "sizes; the defaults are what the report's bars are for")

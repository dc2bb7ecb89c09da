"""The settings of each verb, and the parts that only one or two verbs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_steerlm.config.compute import ComputeConfig, ParallelConfig, ProcessesConfig
from nemo_steerlm.config.data import OVERLONG, DataConfig, PolicyDataConfig
from nemo_steerlm.config.fields import MOST_SEED, option
from nemo_steerlm.config.model import HEADS, ModelConfig, RegressorModelConfig
from nemo_steerlm.config.prompt import AttributesConfig, TemplateConfig
from nemo_steerlm.config.training import LoggingConfig, LossConfig, OptimizerConfig, TrainerConfig
from nemo_steerlm.errors import ConfigError

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
    seed: int = option(10, "seed of the split, and of synthetic data", least=0, most=MOST_SEED)
    languages: list[str] | None = option(None, "keep only these, e.g. languages=[en,de]; null = all")
    dedupe: bool = option(True, "drop repeated conversations")
    tokenizer: str | None = option(None, "the report counts lengths in its tokens; null = characters")
    recipe: str = option(
        "default", "nemo_aligner = the reference's files byte for byte", choices=("default", "nemo_aligner")
    )


@dataclass(kw_only=True)
class ImportConfig:
    """Settings of `steerlm import`."""

    input: str = option(MISSING, "Hugging Face folder, .gguf file, or llama2.c .bin file", example="Llama-3.1-8B")
    output: str = option(MISSING, "model folder to write", example="outputs/base")
    tokenizer: str | None = option(None, "Hugging Face folder or SentencePiece file; null = the input's own")
    attributes: AttributesConfig = option(
        AttributesConfig, "names of a sequence classifier's outputs; a language model gets a token for each value"
    )
    template: TemplateConfig | None = option(
        None, "prompt; null = the model's own where that can be written, else SteerLM's; a classifier's: SteerLM's"
    )
    trainer: ProcessesConfig = option(ProcessesConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class ExportConfig:
    """Settings of `steerlm export`."""

    checkpoint: str = option(MISSING, "model folder", example="outputs/policy/model")
    output: str = option(MISSING, "folder to write", example="outputs/policy-hf")
    scalar: dict[str, float] = option(dict, "one weighted sum of a regressor's attributes: scalar.helpfulness=0.65")
    dtype: str | None = option(
        None, "number format of the weights; null = as trained", choices=("float32", "bfloat16", "float16")
    )
    trainer: ProcessesConfig = option(ProcessesConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


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
    seed: int = option(1234, "seed of weights, data order and dropout", least=0, most=MOST_SEED)
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
class SteeringConfig:
    """How it is measured whether a policy listens to its labels and does what it is asked."""

    scorers: list[str] | None = option(
        None, "what measures answers: model folder of a regressor, text, oracle, MODULE:FUNCTION, http://..."
    )
    measures: dict[str, str] = option(dict, "attribute to the score with another name: {verbosity:tokens}")
    rows: int = option(200, "labelled rows whose labels are exchanged; 0 = none", least=0)
    prompts: int = option(50, "prompts that are answered at every level; 0 = none", least=0)
    max_new_tokens: int = option(256, "longest answer, tokens", least=1)
    batch_size: int = option(64, "answers generated at once", least=1)


@dataclass(kw_only=True)
class SteeringCheckConfig(SteeringConfig):
    """The short form, at the end of a training."""

    check: bool = option(True, "end with a short measurement of steering, in steering.json")
    rows: int = option(100, "validation rows whose labels are exchanged, at every validation too; 0 = none", least=0)
    prompts: int = option(8, "prompts that are answered at three levels; 0 = none", least=0)
    max_new_tokens: int = option(64, "longest answer, tokens", least=1)


@dataclass(kw_only=True)
class TrainSftConfig(TrainConfig):
    """Settings of `steerlm train-sft`."""

    data: PolicyDataConfig = option(PolicyDataConfig, "training data")
    model: ModelConfig = option(ModelConfig, "model")
    steering: SteeringCheckConfig = option(SteeringCheckConfig, "whether the policy listens and obeys")


@dataclass(kw_only=True)
class AnnotateConfig:
    """Settings of `steerlm annotate`."""

    checkpoint: str = option(MISSING, "model folder of a regressor", example="outputs/regressor/model")
    input: str = option(MISSING, "conversations", example="data/train.jsonl")
    output: str = option(MISSING, "labelled conversations", example="outputs/labelled.jsonl")
    turns: str = option("all", "assistant turns to label", choices=("all", "labelled", "missing"))
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=OVERLONG)
    max_length: int | None = option(None, "longest sample, tokens; null = the model's", least=2)
    batch_tokens: int | None = option(None, "tokens a forward pass; null = 16384 on a GPU, 2048 on a CPU", least=1)
    part_size: int = option(1024, "conversations a part file: what a kill loses at most", least=1)
    calibrated: bool = option(True, "apply the calibration stored with the model, if there is one")
    distributions: bool = option(False, "also write the probability of every level; not with head=regression")
    shards: str | None = option(None, "i/n: do this share of the parts, i from 0; the last share to end joins all")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class SamplingConfig:
    """How responses are drawn."""

    responses: int = option(4, "responses a prompt", least=1)
    top_k: int = option(50, "draw among the k likeliest tokens; 0 = all", least=0)
    top_p: float | None = option(None, "draw among the likeliest of this total probability", least=0.0, most=1.0)
    temperature: float = option(1.0, "0 = always the likeliest token", least=0.0)
    max_new_tokens: int = option(512, "longest response, tokens", least=1)
    batch_size: int = option(64, "responses generated at once", least=1)


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
    part_size: int = option(256, "prompts a part file: what a kill loses at most", least=1)
    seed: int = option(1234, "seed of combinations and responses", least=0, most=MOST_SEED)
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
    steering: SteeringCheckConfig = option(SteeringCheckConfig, "whether the new policy listens and obeys")
    seed: int = option(1234, "seed of everything drawn", least=0, most=MOST_SEED)
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
    floor_train: str | None = option(None, "held-out pairs for the TF-IDF baseline; null = cross-fit on the input")


@dataclass(kw_only=True)
class SteerabilityConfig(SteeringConfig):
    """Settings of `steerlm evaluate task=steerability`."""

    ways: list[str] = option(
        lambda: ["default", "alone", "all"],
        "one attribute with the others at their default, one alone, all at random levels: of default, alone, all",
    )
    quality: str | None = option(None, "score that tells a setting's cost; null = quality or helpfulness, if measured")
    temperature: float = option(0.0, "0 = always the likeliest token", least=0.0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0 = all", least=0)


@dataclass(kw_only=True)
class EvaluateConfig:
    """Settings of `steerlm evaluate`."""

    task: str = option(
        MISSING, "what to measure", choices=("regressor", "preference", "label_noise", "steerability"),
        example="regressor",
    )  # fmt: skip
    checkpoint: str | None = option(
        None, "model folder of a regressor, of a policy for steerability; label_noise does without where the rows "
        "hold its predictions"
    )  # fmt: skip
    input: Any = option(
        MISSING, "conversations with labels, a file or [ONE,TWO]; preferences", example="data/val.jsonl"
    )
    output: str = option(MISSING, "folder for report.json, report.html and pictures", example="outputs/evaluation")
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=OVERLONG)
    max_length: int | None = option(None, "longest sample, tokens; null = the model's", least=2)
    batch_tokens: int | None = option(None, "tokens a forward pass, as annotate's", least=1)
    seed: int = option(0, "seed of the bootstrap intervals", least=0, most=MOST_SEED)
    resamples: int = option(1000, "resamples for the intervals; 0 = none; task=preference: always 1000", least=0)
    calibrate: str | None = option(
        None, "fit a calibration on the input and store it with the model; temperature: of a distribution",
        choices=("isotonic", "linear", "temperature"),
    )  # fmt: skip
    preference: PreferenceConfig = option(PreferenceConfig, "of task=preference")
    steerability: SteerabilityConfig = option(SteerabilityConfig, "of task=steerability")
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
    system: str | None = option(None, "system prompt; null = that of the model's template")
    attributes: dict[str, float | None] = option(
        dict, "what to steer: attributes.humor=4; the others take the schema's defaults, null leaves one out"
    )
    temperature: float = option(0.0, "0 = always the likeliest token", least=0.0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0 = all", least=0)
    top_p: float = option(1.0, "draw among the likeliest of this total probability", least=0.0, most=1.0)
    max_new_tokens: int = option(256, "longest response, tokens", least=1)
    seed: int = option(1234, "seed of the draw", least=0, most=MOST_SEED)
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
    policy_steps: int = option(700, "optimizer steps of the policy", least=1)
    policy_lr: float = option(3e-3, "its peak learning rate", least=0.0)
    attribute_dropout: float = option(0.3, "share of its samples that see a part of their label", least=0.0, most=1.0)
    label_dropout: float = option(0.1, "share of its samples that see no attribute string", least=0.0, most=1.0)
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
    seed: int = option(0, "seed of everything: world, weights, samples", least=0, most=MOST_SEED)
    compare_labels: bool = option(False, "also train policies on no, human and permuted labels")
    recipe: QuickstartRecipe = option(QuickstartRecipe, "sizes; the defaults are what the report's bars are for")

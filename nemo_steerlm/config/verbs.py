"""The settings of the verbs other than training and evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_steerlm import hub
from nemo_steerlm.config.compute import ComputeConfig, Inference, InProcesses, ParallelConfig, ProcessesConfig
from nemo_steerlm.config.data import OVERLONG
from nemo_steerlm.config.fields import MOST_SEED, Settings, option
from nemo_steerlm.config.prompt import AttributesConfig, TemplateConfig
from nemo_steerlm.errors import ConfigError

PREPARE_SOURCES = (
    "oasst", "helpsteer", "helpsteer2", "helpsteer2_preference", "helpsteer3", "hh_rlhf", "ultrafeedback", "self_id",
    "messages", "steerlm", "table", "synthetic",
)  # fmt: skip


@dataclass(kw_only=True)
class PrepareConfig(Settings):
    """Settings of `steerlm prepare`."""

    source: str = option(MISSING, "kind of dataset", choices=PREPARE_SOURCES, example="oasst")
    input: str | None = option(None, "file or folder, or with revision a dataset on the hub; synthetic needs none")
    revision: str | None = option(None, "commit, tag or branch of the dataset on the hub")
    output: str | None = option(None, "folder for train.jsonl, val.jsonl, report.json, report.html")
    check: bool = option(False, "read everything and report, but write nothing")
    dataset: str | None = option(None, "name that every row carries; null = the source's")
    columns: dict[str, str] = option(dict, "source=table: {prompt:COLUMN,response:COLUMN,quality:COLUMN,...}")
    attributes: AttributesConfig = option(AttributesConfig, "attribute schema; null = the source's own")
    val_fraction: float | None = option(0.05, "share held out; null = the dataset's own split", least=0.0, below=1.0)
    seed: int = option(10, "seed of the split, and of synthetic data", least=0, most=MOST_SEED)
    languages: list[str] | None = option(None, "keep only these, e.g. languages=[en,de]; null = all")
    dedupe: bool = option(True, "drop repeated conversations")
    tokenizer: str | None = option(None, "counts the lengths in the report; null = in characters", hub=True)
    recipe: str = option(
        "default", "nemo_aligner = the reference's files byte for byte", choices=("default", "nemo_aligner")
    )

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that source and recipe use the other settings."""
        super().validate(prefix)
        reference, synthetic = self.recipe == "nemo_aligner", self.source == "synthetic"
        if not self.output and not self.check:
            raise ConfigError("output is missing; give it on the command line, e.g. output=outputs/data")
        if self.columns and self.source != "table":
            raise ConfigError(f"columns is for source=table, found source={self.source}")
        if reference and (self.source != "oasst" or self.languages):
            raise ConfigError("recipe=nemo_aligner is for source=oasst without languages=; use recipe=default")
        if self.check and (reference or synthetic):
            raise ConfigError("check=true reads a dataset by recipe=default; there is nothing else to check")
        if self.val_fraction is None and (reference or synthetic):
            raise ConfigError("val_fraction=null keeps a dataset's own split, which is not known here; give a share")


@dataclass(kw_only=True)
class ImportConfig(InProcesses):
    """Settings of `steerlm import`."""

    input: str = option(
        MISSING, "Hugging Face folder or name on the hub, .gguf file, or llama2.c .bin file", example="Llama-3.1-8B",
        hub=True,
    )  # fmt: skip
    output: str = option(MISSING, "model folder to write", example="outputs/base")
    tokenizer: str | None = option(
        None, "Hugging Face folder, name on the hub or SentencePiece file; null = the input's own", hub=True
    )
    attributes: AttributesConfig = option(
        AttributesConfig, "names of a sequence classifier's outputs; a language model gets a token for each value"
    )
    template: TemplateConfig | None = option(
        None, "prompt; null = the model's own where it can be expressed, else SteerLM's; a classifier's: SteerLM's"
    )
    trainer: ProcessesConfig = option(ProcessesConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class ExportConfig(InProcesses):
    """Settings of `steerlm export`."""

    checkpoint: str = option(MISSING, "model folder or name on the hub", example="outputs/policy/model", hub=True)
    output: str = option(MISSING, "folder to write", example="outputs/policy-hf")
    scalar: dict[str, float] = option(dict, "one weighted sum of a regressor's attributes: scalar.helpfulness=0.65")
    dtype: str | None = option(
        None, "number format of the weights; null = as trained", choices=("float32", "bfloat16", "float16")
    )
    trainer: ProcessesConfig = option(ProcessesConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class PushToHubConfig(Settings):
    """Settings of `steerlm push-to-hub`."""

    input: str = option(MISSING, "folder that export wrote, or a model folder", example="outputs/policy-hf")
    repository: str = option(MISSING, "OWNER/NAME on the hub; made if it is not there", example="me/policy")
    private: bool = option(True, "whether a new repository is private; one that exists stays as it is")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the repository has the form of a name on the hub."""
        super().validate(prefix)
        if not hub.is_name(self.repository):
            raise ConfigError(f"repository={self.repository}: expected OWNER/NAME, as on the hub")


@dataclass(kw_only=True)
class AnnotateConfig(Inference):
    """Settings of `steerlm annotate`."""

    checkpoint: str = option(
        MISSING, "model folder of a regressor or its name on the hub", example="outputs/regressor/model", hub=True
    )
    input: str = option(MISSING, "conversations", example="data/train.jsonl")
    output: str = option(MISSING, "labelled conversations", example="outputs/labelled.jsonl")
    turns: str = option("all", "assistant turns to label", choices=("all", "labelled", "missing"))
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=OVERLONG)
    max_length: int | None = option(None, "longest sample, tokens; null = the model's", least=2)
    batch_tokens: int | None = option(None, "tokens a forward pass; null = 16384 on a GPU, 2048 on a CPU", least=1)
    part_size: int = option(1024, "conversations a part file; an interruption loses one at most", least=1)
    calibrated: bool = option(True, "apply the calibration stored with the model, if there is one")
    distributions: bool = option(False, "also write the probability of every level; not with head=regression")
    shards: str | None = option(None, "i/n: do this share of the parts, i from 0; the last share to end joins all")
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")

    def validate(self, prefix: str = "") -> None:
        """As `Inference.validate`, and that the output is not the input, and `shards` is valid."""
        super().validate(prefix)
        if Path(self.input).resolve() == Path(self.output).resolve():
            raise ConfigError(f"output={self.output}: this is the input; annotate writes another file")
        self.share()

    def share(self) -> tuple[int, int]:
        """`(i, n)` of `shards`.

        Raises:
            ConfigError: it is malformed.
        """
        if self.shards is None:
            return 0, 1
        number, _, count = self.shards.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            last = f"0/{count} to {int(count) - 1}/{count}" if count.isdecimal() and int(count) else "0/8 to 7/8"
            raise ConfigError(f"shards={self.shards}: expected i/n with i from 0 to n - 1, so {last}")
        return int(number), int(count)


@dataclass(kw_only=True)
class SamplingConfig(Settings):
    """How responses are drawn."""

    responses: int = option(4, "responses a prompt", least=1)
    top_k: int = option(50, "draw among the k likeliest tokens; 0 = all", least=0)
    top_p: float | None = option(None, "draw among the likeliest of this total probability", least=1e-9, most=1.0)
    temperature: float = option(1.0, "0 = always the likeliest token", least=0.0)
    max_new_tokens: int = option(512, "longest response, tokens", least=1)
    batch_size: int = option(64, "responses generated at once", least=1)


@dataclass(kw_only=True)
class SampleConfig(SamplingConfig, Inference):
    """Settings of `steerlm sample` (step 4a)."""

    checkpoint: str = option(
        MISSING, "model folder of a policy or its name on the hub", example="outputs/policy/model", hub=True
    )
    prompts: str = option(MISSING, "conversations whose user turns are answered", example="data/train.jsonl")
    annotated: str = option(
        MISSING, "data from which attribute combinations are drawn", example="outputs/labelled.jsonl"
    )
    target: list[str] = option(MISSING, "attributes held at their maximum", example="[quality]")
    output: str = option(MISSING, "responses", example="outputs/responses.jsonl")
    part_size: int = option(256, "prompts a part file; an interruption loses one at most", least=1)
    seed: int = option(1234, "seed of combinations and responses", least=0, most=MOST_SEED)
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class GenerateConfig(Inference):
    """Settings of `steerlm generate`."""

    checkpoint: str = option(
        MISSING, "model folder of a policy or its name on the hub", example="outputs/policy/model", hub=True
    )
    prompt: str = option(MISSING, "what the user says", example="'Name a good book.'")
    system: str | None = option(None, "system prompt; null = that of the model's template")
    attributes: dict[str, float | None] = option(
        dict, "what to steer: attributes.humor=4; the others take the schema's defaults, null leaves one out"
    )
    temperature: float = option(0.0, "0 = always the likeliest token", least=0.0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0 = all", least=0)
    top_p: float = option(1.0, "draw among the likeliest of this total probability", least=1e-9, most=1.0)
    max_new_tokens: int = option(256, "longest response, tokens", least=1)
    seed: int = option(1234, "seed of the draw", least=0, most=MOST_SEED)
    trainer: ComputeConfig = option(ComputeConfig, "processes")
    parallel: ParallelConfig = option(ParallelConfig, "layout")


@dataclass(kw_only=True)
class ExperimentsConfig(Settings):
    """Settings of `steerlm experiments`."""

    verb: str | None = option(
        None, "only the experiments of this verb; null = all",
        choices=("train-regressor", "annotate", "train-sft", "sample", "bootstrap"),
    )  # fmt: skip
    config_dir: str | None = option(None, "folder of your own groups, searched too")


@dataclass(kw_only=True)
class QuickstartRecipe(Settings):
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
    attribute_dropout: float = option(0.3, "share of samples that see some of their attributes", least=0.0, most=1.0)
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
class QuickstartConfig(Settings):
    """Settings of `steerlm quickstart`."""

    output: str = option("outputs/quickstart", "folder of data, models and report")
    seed: int = option(0, "seed of everything: world, weights, samples", least=0, most=MOST_SEED)
    compare_labels: bool = option(False, "also train policies on no, human and permuted labels")
    recipe: QuickstartRecipe = option(QuickstartRecipe, "sizes; the report's bars are for the defaults")

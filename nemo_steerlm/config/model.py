"""Models: their architecture, where the weights come from, and which of them are trained."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_steerlm.config.families import FAMILIES, family_of
from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.errors import ConfigError, suggest

LORA_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
HEADS = ("regression", "ordinal", "distribution", "generative")


@dataclass(kw_only=True)
class RopeScaling(Settings):
    """Llama 3.1's scaling of rotary frequencies."""

    factor: float = option(8.0, "factor of the context extension", least=1.0)
    low_freq_factor: float = option(1.0, "wavelengths above original / this are scaled in full", least=1e-3)
    high_freq_factor: float = option(4.0, "wavelengths below original / this are not scaled", least=1e-3)
    original_max_position_embeddings: int = option(8192, "context length before scaling, tokens", least=1)


@dataclass(kw_only=True)
class Architecture(Settings):
    """Shape of a network: rotary positions, grouped-query attention, the traits of its family (`families`)."""

    family: str = option("llama", "model family: norms, activation, biases", choices=tuple(FAMILIES))
    num_layers: int = option(2, "transformer layers", least=1)
    hidden_size: int = option(128, "width of the residual stream", least=1)
    ffn_hidden_size: int = option(384, "width inside the feed-forward block", least=1)
    num_attention_heads: int = option(4, "query heads", least=1)
    num_query_groups: int | None = option(None, "key/value heads; null = as many as query heads", least=1)
    head_dim: int | None = option(None, "width of a head; null = hidden_size / num_attention_heads", least=1)
    vocab_size: int = option(0, "true vocabulary size; 0 = that of the tokenizer", least=0)
    max_position_embeddings: int = option(4096, "longest sequence the model is meant for, tokens", least=1)
    norm_epsilon: float = option(1e-5, "epsilon of the norms", least=0.0)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", least=1.0)
    rotary_percent: float = option(1.0, "share of a head that is rotated; Nemotron: 0.5", least=0.0, most=1.0)
    rope_scaling: RopeScaling | None = option(None, "Llama 3.1 frequency scaling; null = none")
    tie_word_embeddings: bool = option(False, "one matrix for embedding and output")
    init_std: float = option(0.02, "standard deviation of random weights", least=0.0)
    hidden_dropout: float = option(0.0, "dropout after attention and feed-forward", least=0.0, most=1.0)
    attention_dropout: float = option(0.0, "dropout on attention weights", least=0.0, most=1.0)
    pad_vocab_to: int = option(128, "rows of the embedding are padded to a multiple of this", least=1)

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that the family has these traits."""
        super().validate(prefix)
        family_of(self)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(kw_only=True)
class LoRAConfig(Settings):
    """Low-rank adapters (Hu et al., arXiv 2106.09685): W is frozen, W + alpha / rank * B A is used."""

    rank: int = option(0, "rank of the adapters; 0 = none, all weights are trained", least=0)
    alpha: float = option(32.0, "adapters are scaled by alpha / rank", least=0.0)
    dropout: float = option(0.0, "dropout on the adapters' inputs", least=0.0, most=1.0)
    targets: list[str] = option(lambda: list(LORA_TARGETS), f"linear layers to adapt, of {', '.join(LORA_TARGETS)}")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that these linear layers exist."""
        super().validate(prefix)
        for name in self.targets:
            if name not in LORA_TARGETS:
                raise ConfigError(
                    f"model.lora.targets: no linear is called {name}{suggest(name, LORA_TARGETS) or '.'} "
                    f"There are {', '.join(LORA_TARGETS)}"
                )
        if self.rank and not self.targets:
            raise ConfigError(
                f"model.lora.rank={self.rank} with an empty model.lora.targets trains nothing; name at least one "
                "linear"
            )


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Where the weights come from and which of them are trained."""

    init: str | None = option(
        None, "model folder, Hugging Face folder or name on the hub to start from; null = random weights", hub=True
    )
    tokenizer: str | None = option(
        None, "Hugging Face folder, name on the hub or SentencePiece file; needed for random weights", hub=True
    )
    architecture: Architecture | None = option(None, "shape for random weights; model=llama_tiny and so on fill it")
    lora: LoRAConfig = option(LoRAConfig, "low-rank adapters; a policy's attribute tokens are trained with them")
    freeze: str = option(
        "none", "trunk = train a regressor's head alone, or the embeddings of a policy's attribute tokens",
        choices=("none", "trunk"),
    )  # fmt: skip

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that weights have one source, which is given where some stay frozen."""
        super().validate(prefix)
        if self.init is None and self.architecture is None:
            raise ConfigError(
                "model.init is missing; give a model folder or a Hugging Face folder (model.init=outputs/base),"
                " or a shape for random weights (model=llama_tiny)"
            )
        if self.init is not None and self.architecture is not None:
            raise ConfigError(f"model.init={self.init} brings its own architecture; leave out model= or model.init=")
        if self.init is None and self.tokenizer is None:
            raise ConfigError(
                "model.tokenizer is missing: random weights need one, e.g. model.tokenizer=tokenizer.model"
            )
        rank = self.lora.rank
        frozen = f"model.lora.rank={rank}" if rank else f"model.freeze={self.freeze}"
        if rank and self.freeze != "none":
            raise ConfigError(f"{frozen} trains adapters in what model.freeze={self.freeze} freezes; give one")
        if self.init is None and (rank or self.freeze != "none"):
            raise ConfigError(f"{frozen} keeps the weights it starts from: give them with model.init=FOLDER")


@dataclass(kw_only=True)
class RegressorModelConfig(ModelConfig):
    """Where the regressor's weights come from."""

    head_init: str | None = option(
        None, "mean = a new head starts by predicting the labels' means or shares; null = near zero", choices=("mean",)
    )
    pooling: str | None = option(
        None, "what the head reads: the text's last token or all of them; null = as model.init, else last",
        choices=("last", "mean"),
    )  # fmt: skip

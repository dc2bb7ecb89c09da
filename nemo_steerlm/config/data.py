"""Training data: files, lengths, packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_steerlm.config.fields import Settings, option
from nemo_steerlm.errors import ConfigError

OVERLONG = ("truncate_history", "drop", "error")


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Training data."""

    train: Any = option(MISSING, "conversations (.jsonl or .jsonl.gz), or [ONE,TWO]", example="data/train.jsonl")
    val: Any = option(None, "conversations to validate on, or [ONE,TWO]; null = no validation")
    weights: list[float] | None = option(
        None, "how often an epoch draws the rows of each file of data.train, e.g. [1,0.5]; null = once"
    )
    max_length: int = option(4096, "longest sample, tokens", least=2)
    overlong: str = option("truncate_history", "what happens to a longer sample", choices=OVERLONG)
    packing: bool = option(False, "put several samples into a row instead of padding; micro_batch_size is then unused")
    pack_length: int | None = option(None, "longest packed row, tokens; null = max_length", least=2)
    cache: str | None = option(None, "folder of tokenised data; null = .steerlm-cache beside the data")

    def validate(self, prefix: str = "") -> None:
        """As `Settings.validate`, and that there is one weight a file, and a sample fits into a row."""
        super().validate(prefix)
        _check_files("data.train", self.train)
        if self.val is not None:
            _check_files("data.val", self.val)
        files = self.train_files()
        if self.weights is not None and (len(self.weights) != len(files) or min(self.weights, default=0) <= 0):
            raise ConfigError(
                f"data.weights={self.weights}: expected one number above 0 for each of the {len(files)} files of "
                "data.train"
            )
        if self.packing and self.pack_length is not None and self.pack_length < self.max_length:
            raise ConfigError(
                f"data.pack_length={self.pack_length} is smaller than data.max_length={self.max_length}: a sample must"
                " fit into a row; raise data.pack_length or lower data.max_length"
            )

    def train_files(self) -> list[str]:
        """The files of `train`."""
        return list(self.train) if isinstance(self.train, (list, tuple)) else [self.train]

    def val_files(self) -> list[str]:
        """The files of `val`, none for null."""
        return [self.val] if isinstance(self.val, str) else list(self.val or [])

    def row_length(self) -> int | None:
        """Most tokens of a packed row, None without packing."""
        return (self.pack_length or self.max_length) if self.packing else None


@dataclass(kw_only=True)
class PolicyDataConfig(DataConfig):
    """Training data of a policy."""

    attribute_dropout: float = option(0.0, "share of samples that see some of their attributes", least=0.0, most=1.0)
    label_dropout: float = option(0.0, "share of samples that see no attribute string", least=0.0, most=1.0)

    def validate(self, prefix: str = "") -> None:
        """As `DataConfig.validate`, and that the shares sum to 1 at most."""
        super().validate(prefix)
        check_dropout(self.attribute_dropout, self.label_dropout)


def check_dropout(attribute_dropout: float, label_dropout: float) -> None:
    """Refuse shares outside of 0 to 1, or with a sum above 1 (ConfigError)."""
    PolicyDataConfig.check_values(attribute_dropout=attribute_dropout, label_dropout=label_dropout)
    if attribute_dropout + label_dropout > 1:
        raise ConfigError(f"attribute_dropout + label_dropout is {attribute_dropout + label_dropout:g}, above 1")


def _check_files(key: str, value: Any) -> None:
    """Refuse a value that is neither a file nor a list of files (ConfigError that begins with the key)."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{key}={value}: expected a file, or a list of files: {key}=[one.jsonl,two.jsonl]")

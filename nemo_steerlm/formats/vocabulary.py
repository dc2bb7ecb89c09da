"""Adds a token for every `attribute:value` to a language model.

If a label is split into name, colon and digit, a pretrained model ignores it until it has learned which digit belongs
to which name. A single token has its own embedding, which learns faster than the rest (`megatron.token_adapter`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.formats.hf import TensorSource
from nemo_steerlm.formats.hf_config import EMBEDDING, HEAD
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer


def with_attribute_tokens(tokenizer: Tokenizer, schema: AttributeSchema, folder: Path) -> Tokenizer:
    """Write the tokenizer with `schema.tokens` added into `folder`, and read it back.

    Raises:
        ConfigError: it is not a Hugging Face tokenizer with a `tokenizer.json`.
    """
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            "attributes gives every value a token, which needs a tokenizer.json; save the tokenizer with transformers "
            "first (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)) and give tokenizer=FOLDER, or leave "
            "attributes out"
        )
    backend = Backend.from_file(str(file))
    backend.add_tokens([AddedToken(token, normalized=False) for token in schema.tokens])
    backend.save(str(file))
    return load_tokenizer(folder)


@dataclasses.dataclass
class MoreRows:
    """A source with rows for new tokens in its vocabulary: each is the mean of the old rows.

    Attributes:
        source: The original source.
        first: The lowest new id; unused rows of the source from there on are replaced.
        stop: The highest new id plus one.
    """

    source: TensorSource
    first: int
    stop: int

    def __post_init__(self) -> None:
        self.where = self.source.where

    @property
    def format(self) -> str:
        """Of the source."""
        return self.source.format

    @property
    def dtype(self) -> torch.dtype:
        """Of the source."""
        return self.source.dtype

    def tokenizer_folder(self) -> Path | None:
        """Of the source, which lacks the new tokens."""
        return self.source.tokenizer_folder()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the source, with the rows of the new tokens."""
        return {
            name: (max(shape[0], self.stop), *shape[1:]) if name in (EMBEDDING, HEAD) else shape
            for name, shape in self.source.shapes().items()
        }

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As the source's; see `TensorSource`."""
        if name not in (EMBEDDING, HEAD):
            return self.source.read(name, dim, start, stop)
        assert dim == 0  # as the vocabulary is cut
        size = self.source.shapes()[name][0]
        stop = self.shapes()[name][0] if stop is None else stop
        old = self.source.read(name, 0, min(start, size), min(stop, size))
        if stop <= self.first:
            return old
        mean = self.source.read(name, 0, 0, self.first).float().mean(0).to(old.dtype)
        rows = mean.repeat(stop - start, 1)
        kept = torch.tensor([i for i in range(start, min(stop, size)) if not self.first <= i < self.stop]).long()
        rows[kept - start] = old[kept - start]
        return rows

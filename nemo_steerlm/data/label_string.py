"""The attribute string as prediction target: ``quality:4,toxicity:0`` as tokens, each value a single token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.tokenizer import Tokenizer


class LabelString:
    """Encodes label vectors for a generative regressor (SteerLM, arXiv 2310.05344, section 3.2).

    Names and values are tokenised separately, so that a level is the same token in every place.

    Attributes:
        levels: of each attribute the tokens of low, low + 1, ..., high.

    Raises:
        ConfigError: a level is not one token, or two levels share one.
    """

    def __init__(self, schema: AttributeSchema, tokenizer: Tokenizer) -> None:
        self._schema = schema
        self._first = tokenizer.encode_continuations([f"{name}:" for name in schema.names])
        self._later = tokenizer.encode_continuations([f",{name}:" for name in schema.names])
        self.levels: list[list[int]] = []
        for attribute in schema:
            ids = [tokenizer.token_id(str(level)) for level in range(attribute.low, attribute.high + 1)]
            known = [token for token in ids if token is not None]
            if len(set(known)) < len(ids):
                level = next(n for n, token in enumerate(ids, attribute.low) if token is None or ids.count(token) > 1)
                raise ConfigError(
                    f"head=generative reads one token a level, but level {level} of {attribute.name} is no token of "
                    "its own in this tokenizer; use another range of values, or head=distribution"
                )
            self.levels.append(known)

    def name(self, k: int, first: bool) -> list[int]:
        """Tokens of ``name:`` of attribute k, after a comma where it is not the first of its line."""
        return self._first[k] if first else self._later[k]

    def encode(self, labels: Sequence[float]) -> tuple[list[int], list[int]]:
        """Tokens of a label vector (NaN = missing) in schema order, and the attribute each is the value of, else -1.

        Values are rounded to levels, half to even, as in the attribute strings a policy reads.
        """
        ids: list[int] = []
        places: list[int] = []
        for k, (attribute, value) in enumerate(zip(self._schema, labels, strict=True)):
            if not math.isnan(value):
                name = self.name(k, first=not ids)
                ids += [*name, self.levels[k][round(float(value)) - attribute.low]]
                places += [*[-1] * len(name), k]
        return ids, places

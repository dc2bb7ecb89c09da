"""The lengths of a data set, counted in a prepared file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import read_conversations
from nemo_steerlm.data.policy_dataset import PolicyDataset
from nemo_steerlm.data.regression_dataset import RegressionDataset
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

#: Characters of a token of English where no tokenizer is given. An assumption.
CHARACTERS = 4.0
#: Global batches that are sorted by length together (`train.global_batches`).
_POOL = 16


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set.

    Attributes:
        samples: of one epoch.
        tokens: of all samples.
        loss_share: share of the tokens that carry a policy's loss.
        padding: share of padding in the rows without packing.
        source: how the tokens were counted.
    """

    samples: int
    tokens: int
    loss_share: float = 1.0
    padding: float = 0.0
    source: str = "as given"


def count(
    path: Path,
    *,
    regressor: bool,
    schema: AttributeSchema,
    template: PromptTemplate,
    tokenizer: Tokenizer | None,
    max_length: int,
    overlong: str,
    batch: int,
    micro_batch: int,
    equal_lengths: bool,
) -> Data:
    """Read the samples of a file as a training would.

    Without a tokenizer a token is taken to be 4 characters of the conversations' text, and all of it to carry loss.

    Args:
        regressor: samples are labelled responses; else conversations.
        batch, micro_batch: samples of a global batch and of a micro-batch, for the padding.
        equal_lengths: all rows of a global batch are padded to one length, as pipeline stages expect.

    Raises:
        DataError: the file is malformed or holds no sample.
    """
    rows, loss_share = read_conversations(path), 1.0
    if tokenizer is None:
        texts = [sum(len(turn.text) for turn in row.turns) + len(row.system or "") for row in rows]
        lengths = np.minimum(np.ceil(np.array(texts) / CHARACTERS), max_length).astype(int)
        source = f"{CHARACTERS:g} characters a token: no tokenizer given"
    elif regressor:
        lengths = RegressionDataset.build(rows, schema, template, tokenizer, max_length, overlong).lengths
        source = "counted with the tokenizer"
    else:
        built = PolicyDataset.build(rows, schema, template, tokenizer, max_length, overlong)
        lengths, source = built.lengths, "counted with the tokenizer"
        loss_share = built.report["loss_tokens"] / built.report["tokens"]
    padding = padded_share(lengths, batch, batch if equal_lengths else micro_batch)
    return Data(samples=len(lengths), tokens=int(lengths.sum()), loss_share=loss_share, padding=padding, source=source)


def padded_share(lengths: np.ndarray, batch: int, group: int) -> float:
    """Share of padding where rows are padded to the longest of their group of so many neighbours in length."""
    order = np.random.default_rng(0).permutation(lengths)
    computed = 0
    for start in range(0, len(order), batch * _POOL):
        pool = np.sort(order[start : start + batch * _POOL])[::-1]
        firsts = pool[::group]
        sizes = np.minimum(group, len(pool) - np.arange(0, len(pool), group))
        computed += int((firsts * sizes).sum())
    return 1 - int(lengths.sum()) / computed

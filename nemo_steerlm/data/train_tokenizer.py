"""A byte-level BPE tokenizer trained on the data, for models that start from random weights.

Each `attribute:value` of the schema is one token. If it were split into name, colon and digit, a small model would
first have to learn which digit belongs to which name, and with some seeds it never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.conversation import Conversation
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer, load_tokenizer

PAD = "<pad>"


def corpus(conversations: Iterable[Conversation], template: PromptTemplate) -> Iterator[str]:
    """Texts to train on: every conversation as a regressor reads it."""
    for conversation in conversations:
        yield template.render_regression(conversation, len(conversation.turns) - 1)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, template: PromptTemplate, schema: AttributeSchema, folder: str | Path
) -> Tokenizer:
    """Trains a tokenizer and saves it as a Hugging Face folder.

    Args:
        texts: Training texts, see `corpus`.
        vocab_size: Size before the `attribute:value` tokens; at least the bytes, the padding and the markers.
        template: Its three markers become special tokens; its turn start is the end-of-sequence token.
        schema: Gives one added token per attribute and whole value.
        folder: Where the files go.

    Returns:
        The tokenizer as read back from `folder`.

    Raises:
        ConfigError: `vocab_size` does not hold the bytes and the markers.
    """
    special = [PAD, template.system_start, template.turn_start, template.label_start]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(special) + len(alphabet):
        raise ConfigError(f"vocab_size is {vocab_size}, expected at least {len(special) + len(alphabet)}")
    backend = Backend(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(schema.tokens)
    return _save(backend, template, Path(folder))


def _save(backend: Backend, template: PromptTemplate, folder: Path) -> Tokenizer:
    """Writes the two files that `AutoTokenizer` of every supported transformers version reads."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": template.turn_start,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e9),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(folder)

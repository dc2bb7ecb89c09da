"""One interface for two kinds of tokenizers: Hugging Face folders and SentencePiece ``.model`` files.

BOS and EOS are never added: the prompt template marks every turn itself. A response is tokenised as a continuation of
a prompt, so two things matter that a plain tokenizer call gets wrong: no dummy space may be put before it, and its own
leading space may not be lost when it is decoded.
"""

from __future__ import annotations

from pathlib import Path

from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.tokenizer.base import Tokenizer
from nemo_steerlm.tokenizer.hugging_face import HuggingFaceTokenizer
from nemo_steerlm.tokenizer.sentence_piece import SentencePieceTokenizer

__all__ = ["Tokenizer", "check_vocabulary", "load_tokenizer"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from disk; nothing is downloaded and no code of the folder is run.

    Args:
        path: A Hugging Face folder, a SentencePiece ``.model`` file, or a folder that holds ``tokenizer.model``.

    Raises:
        ConfigError: Nothing there, or not a tokenizer.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise ConfigError(f"tokenizer {path}: expected a folder or a SentencePiece .model file")
    if not path.is_dir():
        raise ConfigError(f"tokenizer {path}: no such file or folder")
    if (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file() or (path / "vocab.txt").is_file():
        return HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer(path / "tokenizer.model")
        tokenizer.refuse_added(path)
        return tokenizer
    raise ConfigError(f"tokenizer {path}: the folder holds neither tokenizer.json nor tokenizer.model")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model: str | Path) -> None:
    """Refuse a tokenizer that gives ids for which a model has no row.

    Args:
        vocab_size: The model's true vocabulary; rows that only pad the embedding are untrained.
        model: The model's name, for the message.

    Raises:
        CheckpointError: The tokenizer has more ids.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {model} has {vocab_size}: it belongs to "
            f"another model, or tokens were added to it and no rows to the embedding"
        )

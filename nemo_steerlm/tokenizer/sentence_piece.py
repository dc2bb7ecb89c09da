"""Tokenizers of SentencePiece ``.model`` files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.tokenizer.base import Tokenizer, copy_file


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a SentencePiece ``.model`` file (ConfigError for another file)."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._file = file
        try:
            backend = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"tokenizer {file}: not a SentencePiece model ({error})") from None
        self._backend: Any = backend
        self.vocab_size = len(backend)
        self.eos_id = backend.eos_id() if backend.eos_id() >= 0 else None
        self.bos_id = backend.bos_id() if backend.bos_id() >= 0 else None
        self.pad_id = backend.pad_id() if backend.pad_id() >= 0 else self.eos_id or 0
        self.normalises = bool(self._proto.normalizer_spec.precompiled_charsmap)

    @functools.cached_property
    def _proto(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._file.read_bytes())

    @functools.cached_property
    def atoms(self) -> dict[str, int]:
        pieces = enumerate(self._proto.pieces)
        return {piece.piece: id_ for id_, piece in pieces if piece.type == piece.USER_DEFINED}

    def normalised(self, text: str) -> str:
        return self._backend.normalize(text)

    def refuse_added(self, folder: Path) -> None:
        """Refuse a folder whose other files add tokens to the model's pieces, because they would be ignored."""
        added: dict[str, int] = {}
        try:
            if (folder / "added_tokens.json").is_file():
                added |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
            if (folder / "tokenizer_config.json").is_file():
                settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
                decoder = settings.get("added_tokens_decoder") or {}
                added |= {token["content"]: int(index) for index, token in decoder.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"tokenizer {folder}: its added tokens cannot be read ({error})") from None
        size = self.vocab_size
        foreign = [f"{t!r} {i}" for t, i in added.items() if i >= size or self._backend.id_to_piece(i) != t]
        if foreign:
            raise ConfigError(
                f"tokenizer {folder}: added tokens that tokenizer.model does not hold ({', '.join(foreign[:4])}) are "
                f"not read; write a tokenizer.json with AutoTokenizer.from_pretrained(F).save_pretrained(F), or name "
                f"tokenizer.model itself to do without them"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts), add_bos=False, add_eos=False)

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        copy_file(self._file, folder / "tokenizer.model")

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._file.read_bytes()).hexdigest()

"""One face for the tokenizers we read: Hugging Face folders and SentencePiece ``.model`` files.

BOS and EOS are never added: the prompt template marks every turn itself. A response is tokenised as a continuation of
a prompt, so two things matter that a plain tokenizer call gets wrong: no dummy space may be put before it, and a
leading space of its own may not be lost when it is decoded.
"""

from __future__ import annotations

import abc
import copy
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)
_ANCHORS = ("\n", ".", "a")
_FILES = (  # what makes a tokenizer folder; copied verbatim, so that nothing changes on the way
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


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
            return _SentencePieceTokenizer(path)
        raise ConfigError(f"tokenizer {path}: expected a folder or a SentencePiece .model file")
    if not path.is_dir():
        raise ConfigError(f"tokenizer {path}: no such file or folder")
    if (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file() or (path / "vocab.txt").is_file():
        return _HuggingFaceTokenizer(path)
    if (path / "tokenizer.model").is_file():
        tokenizer = _SentencePieceTokenizer(path / "tokenizer.model")
        tokenizer.refuse_added(path)
        return tokenizer
    raise ConfigError(f"tokenizer {path}: the folder holds neither tokenizer.json nor tokenizer.model")


def _as_the_file_says(folder: Path, backend: Any) -> Any:
    """transformers' tokenizer of a folder, or one around the folder's tokenizer.json where the two do not agree.

    Some classes of transformers rebuild their pipeline from the class and leave the file's own normaliser and
    pre-tokenizer out (seen with 5.23, LlamaTokenizer and Qwen2Tokenizer): digits, accents and spaces then get ids that
    the model was not trained on.

    Raises:
        ConfigError: tokenizer_config.json names tokens that the file lacks, and the file is to be used.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    file, fast = folder / "tokenizer.json", getattr(backend, "backend_tokenizer", None)
    if fast is None or not file.is_file():
        return backend
    own = Backend.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    if _reads(own) == _reads(fast):
        return backend
    described = folder / "tokenizer_config.json"
    settings = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    for id_, token in settings.get("added_tokens_decoder", {}).items():
        if own.id_to_token(int(id_)) != token["content"]:
            raise ConfigError(
                f"tokenizer {folder}: tokenizer_config.json has the token {token['content']!r} under {id_}, "
                f"tokenizer.json has {own.id_to_token(int(id_))!r}; save the tokenizer anew, so that they agree"
            )
    _log.info(
        "tokenizer %s: transformers' %s gives other ids than tokenizer.json; the file is used", folder,
        type(backend).__name__,
    )  # fmt: skip
    names = {f"{name}_token": getattr(backend, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    known = {key: str(text) for key, text in names.items() if text and own.token_to_id(str(text)) is not None}
    kept = {key: getattr(backend, key, None) for key in ("split_special_tokens", "chat_template")}
    return PreTrainedTokenizerFast(tokenizer_object=own, **kept, **known)


_PROBES = (
    "in 2024 or 1999", "1234567", "cafe\u0301 naïve", "hello world", " lead", "  two  spaces", "\n\n x\t",
    "Don't, I'LL", "ﬁ ① 😀 漢字 ا", "A.b/c_d=-1e5",
)  # fmt: skip


def _reads(tokenizer: Any) -> Any:
    """What decides a tokenizer's ids and text, short of its vocabulary, and the ids of some texts."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in _PROBES]
    return [None if part is None else part.__getstate__() for part in parts], ids


def _steps(normalizer: Any) -> list[dict[str, Any]]:
    """What a normaliser of `tokenizers` does, one after another, as tokenizer.json has it."""
    state: Any = {"type": "Sequence", "normalizers": []}
    if normalizer is not None:
        state = json.loads(normalizer.__getstate__())
    return state["normalizers"] if state["type"] == "Sequence" else [state]


def _marks_spaces(step: dict[str, Any]) -> bool:
    return step.get("pattern") in ({"String": " "}, {"Regex": " {2,}"}, {"Regex": r"\A | \z"})


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model: str | Path) -> None:
    """Refuse a tokenizer that gives ids for which a model has no row.

    Args:
        vocab_size: The model's true vocabulary; rows that only pad the embedding hold nothing that was trained.
        model: What the model is, for the message.

    Raises:
        CheckpointError: The tokenizer has more ids.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {model} has {vocab_size}: it belongs to "
            f"another model, or tokens were added to it and no rows to the embedding"
        )


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: The highest id plus one, added tokens included.
        eos_id: End-of-text id or None.
        bos_id: Begin-of-text id or None.
        pad_id: Padding id; the end-of-text id or 0 where the tokenizer has none.
        unknown: Text of the token for what the vocabulary lacks, where it is one of the `atoms`.
        normalises: Whether letters are changed before a text is cut into tokens.
        rewrites: Whether longer strings are, by rules of the tokenizer's own.
    """

    vocab_size: int
    pad_id: int
    eos_id: int | None
    bos_id: int | None
    unknown: str | None = None
    normalises: bool = False
    rewrites: bool = False

    @functools.cached_property
    def atoms(self) -> dict[str, int]:
        """Texts that are cut out of any text as one token, to its id: added tokens, a model's own symbols."""
        return {}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that steer a model: begin and end of text, chat markers and so on."""
        return frozenset()

    def normalised(self, text: str) -> str:
        """Return a text as the tokenizer's own normaliser leaves it, marks for spaces included."""
        return text

    @property
    def chat_template(self) -> str | None:
        """The Jinja template with which the model's makers write a chat, None where there is none."""
        return None

    def render_chat(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        """Return a chat of OpenAI's messages as :attr:`chat_template` writes it.

        Args:
            messages: ``{"role", "content"}`` each.
            prompt: Whether the text is to end where an answer starts.

        Raises:
            ConfigError: The template refuses the messages.
        """
        raise ConfigError("the tokenizer has no chat template")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that starts a sequence (no BOS, no EOS)."""
        return self.encode_batch([text])[0]

    file_decides = False  # the ids are those of tokenizer.json, and not of the class that its folder names

    @functools.cached_property
    def holes(self) -> list[int]:
        """Ids below ``vocab_size`` that stand for no token, ascending."""
        return []

    def literally(self, names: frozenset[str]) -> Tokenizer | None:
        """Return a tokenizer that reads these added tokens' names as ordinary characters; None where there is none."""
        return None

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return :meth:`encode` of each text; faster than one at a time."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's own files into a folder that :func:`load_tokenizer` reads."""

    @functools.cached_property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 of what decides the ids: equal fingerprints tokenise alike."""

    @functools.cached_property
    def _adds_prefix(self) -> bool:
        probes = ("a", " a", "<", "\n", "A b")
        return any(
            self._after(anchor, [probe])[0] not in (None, self.encode(probe))
            for probe in probes
            for anchor in _ANCHORS
        )

    def _after(self, anchor: str, texts: Sequence[str]) -> list[list[int] | None]:
        head, *rows = self.encode_batch([anchor, *(anchor + text for text in texts)])
        return [ids[len(head) :] if head and ids[: len(head)] == head else None for ids in rows]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Return :meth:`encode_continuation` of each text; faster than one at a time."""
        if not self._adds_prefix:
            return self.encode_batch(texts)
        found = self._after(_ANCHORS[0], texts)
        for index, text in enumerate(texts):
            for anchor in _ANCHORS[1:]:
                if found[index] is None:  # the anchors so far merged with the text
                    found[index] = self._after(anchor, [text])[0]
        return [self.encode(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text: as :meth:`encode`, without a dummy prefix."""
        return self.encode_continuations([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole sequence, special tokens written out."""
        return self._decode([int(token) for token in ids])

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """Return the text of ids that follow others: a leading space is kept."""
        head, before = self._newline
        text = self._decode(head + [int(token) for token in ids])
        return text[len(before) :] if text.startswith(before) else self.decode(ids)

    @functools.cached_property
    def _newline(self) -> tuple[list[int], str]:
        head = self.encode("\n")
        return head, self._decode(head)

    def token_id(self, text: str) -> int | None:
        """Return the id when ``text`` is exactly one token, else None."""
        ids = self.encode_continuation(text)
        return ids[0] if len(ids) == 1 else None


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        self._folder = folder
        described = (folder / "tokenizer_config.json").is_file() or (folder / "config.json").is_file()
        try:
            if described:
                backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            else:
                backend = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            theirs, backend = backend, _as_the_file_says(folder, backend)
            self.file_decides = backend is not theirs
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - transformers raises whatever the broken file led to
            raise ConfigError(f"tokenizer {folder}: cannot be read ({' '.join(str(error).split()):.200})") from None
        backend.model_max_length = int(1e30)  # lengths are ours to check; its warning is noise
        self._backend: Any = backend
        self.vocab_size = max(len(backend), max(backend.get_vocab().values(), default=-1) + 1)
        self.eos_id = backend.eos_token_id
        self.bos_id = backend.bos_token_id
        pad_id = backend.pad_token_id
        self.pad_id = pad_id if pad_id is not None else self.eos_id or 0
        self._normalizer: Any = getattr(getattr(backend, "backend_tokenizer", None), "normalizer", None)
        steps = _steps(self._normalizer)
        self.normalises = any(step["type"] != "Prepend" and not _marks_spaces(step) for step in steps)
        self.rewrites = any(step["type"] == "Replace" and not _marks_spaces(step) for step in steps)
        self.unknown = backend.unk_token if backend.unk_token in self.atoms else None

    @functools.cached_property
    def atoms(self) -> dict[str, int]:
        split = getattr(self._backend, "split_special_tokens", False)
        added = self._backend.added_tokens_decoder.items()
        return {token.content: id_ for id_, token in added if not (split and token.special)}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        added = self._backend.added_tokens_decoder.items()
        return frozenset([*self._backend.all_special_ids, *(id_ for id_, token in added if token.special)])

    def normalised(self, text: str) -> str:
        return self._normalizer.normalize_str(text) if self.normalises else text

    @property
    def chat_template(self) -> str | None:
        found = getattr(self._backend, "chat_template", None)
        return found.get("default") if isinstance(found, dict) else found

    def render_chat(self, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        try:
            return self._backend.apply_chat_template(
                list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # noqa: BLE001 - Jinja raises whatever the template led to
            raise ConfigError(f"the tokenizer's chat template: {' '.join(str(error).split()):.200}") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._backend(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def literally(self, names: frozenset[str]) -> Tokenizer | None:
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        fast = getattr(self._backend, "backend_tokenizer", None)
        if fast is None:
            return None
        state = json.loads(fast.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["content"] in names
        twin = copy.copy(self)
        own = Backend.from_str(json.dumps(state))
        twin._backend = PreTrainedTokenizerFast(tokenizer_object=own, split_special_tokens=True)
        return twin

    @functools.cached_property
    def holes(self) -> list[int]:
        return sorted(set(range(self.vocab_size)).difference(self._backend.get_vocab().values()))

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self._folder / name).is_file():
                _copy(self._folder / name, folder / name)
        if not (folder / "tokenizer_config.json").is_file():
            self._backend.save_pretrained(folder)
        # transformers goes by the model's type too: without it, a Qwen2 tokenizer may be read back as another class
        source, target = self._folder / "config.json", folder / "config.json"
        if source.is_file() and not target.is_file():
            model_type = json.loads(source.read_text(encoding="utf-8")).get("model_type")
            target.write_text(json.dumps({"model_type": model_type}) + "\n", encoding="utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        backend = getattr(self._backend, "backend_tokenizer", None)
        if backend is None:
            matter: Any = sorted(self._backend.get_vocab().items())
        else:
            state = json.loads(backend.to_str())
            matter = [state.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")]
        return hashlib.sha256(json.dumps(matter, sort_keys=True).encode()).hexdigest()


class _SentencePieceTokenizer(Tokenizer):
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
        """Refuse a folder whose other files add tokens to the model's pieces: nothing here would read them."""
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
        _copy(self._file, folder / "tokenizer.model")

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._file.read_bytes()).hexdigest()

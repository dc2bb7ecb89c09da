"""Tokenizers of Hugging Face folders, read by transformers."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.tokenizer.base import Tokenizer, copy_file

_log = logging.getLogger(__name__)
_FILES = (  # the files of a tokenizer folder, copied verbatim
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


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder (ConfigError where it cannot be read)."""

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
        backend.model_max_length = int(1e30)  # lengths are checked elsewhere; its warning is noise
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
                copy_file(self._folder / name, folder / name)
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


def _as_the_file_says(folder: Path, backend: Any) -> Any:
    """transformers' tokenizer of a folder, or one built from the folder's tokenizer.json where they disagree.

    Some classes of transformers ignore the file's own normaliser and pre-tokenizer (seen with 5.23, LlamaTokenizer and
    Qwen2Tokenizer): digits, accents and spaces then get ids that the model was not trained on. Remove when both read
    the file's pipeline (tests/test_tokenizer.py).

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
    """The parts that determine a tokenizer's ids and text, except its vocabulary, and the ids of some texts."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in _PROBES]
    return [None if part is None else part.__getstate__() for part in parts], ids


def _steps(normalizer: Any) -> list[dict[str, Any]]:
    """The steps of a normaliser of `tokenizers`, as in tokenizer.json."""
    state: Any = {"type": "Sequence", "normalizers": []}
    if normalizer is not None:
        state = json.loads(normalizer.__getstate__())
    return state["normalizers"] if state["type"] == "Sequence" else [state]


def _marks_spaces(step: dict[str, Any]) -> bool:
    return step.get("pattern") in ({"String": " "}, {"Regex": " {2,}"}, {"Regex": r"\A | \z"})

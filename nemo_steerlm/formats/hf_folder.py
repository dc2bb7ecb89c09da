"""A Hugging Face folder without its weights: the kind of model, labels, tokenizer, chat template."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from nemo_steerlm.attributes import Attribute, AttributeSchema
from nemo_steerlm.conversation import Conversation, Turn
from nemo_steerlm.errors import CheckpointError, ConfigError
from nemo_steerlm.formats import hf_config
from nemo_steerlm.formats.exported_chat_template import chat_template
from nemo_steerlm.formats.model_folder import ModelCard
from nemo_steerlm.template import PromptTemplate
from nemo_steerlm.tokenizer import Tokenizer

_ADAPTER = "adapter_config.json"
_INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}  # the default has token_type_ids too: generate fails
_STEERLM = "steerlm"  # our key in an exported config.json: attributes with their ranges, and the prompt template
_UNNAMED = re.compile(r"LABEL_\d+")


def is_folder(folder: Path) -> bool:
    """Whether this is a Hugging Face folder (which may hold an adapter only, see `read_card`)."""
    return any((folder / name).is_file() for name in ("config.json", _ADAPTER))


def read_card(folder: Path) -> ModelCard:
    """Read the model metadata of a folder, from its `config.json` alone.

    A model that `export` wrote (see `is_ours`) is recognised, with its attributes and template. Any other sequence
    classifier is a regressor whose attributes are its labels, each on the default range, and `unnamed` where the
    labels are not names. Any other model has the default template.

    Raises:
        CheckpointError: no such folder, an unknown model, or our key in it is damaged.
    """
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder}: an adapter ({_ADAPTER}), no model of its own; merge it into its base model with peft's "
            f"merge_and_unload, and save that"
        )
    path = folder / "config.json"
    data = hf_config.read_config(path)
    architecture = hf_config.architecture_from_config(data, path)
    labels = hf_config.labels_from_config(data)
    ends = tuple(token for token in _ends(folder, data) if token < architecture.vocab_size)
    card = ModelCard(kind="language_model", architecture=architecture, ends=ends)
    own = data.get(_STEERLM)
    if own is not None:
        try:
            schema, template = AttributeSchema.load(own["attributes"]), PromptTemplate.from_dict(own["template"])
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{path}: damaged key {_STEERLM!r}: {error}") from error
        if labels is not None and labels != schema.names:
            raise CheckpointError(
                f"{path}: id2label names {', '.join(labels)}, but the key {_STEERLM!r} {', '.join(schema.names)}"
            )
        kind = "policy" if labels is None else "regressor"
        return dataclasses.replace(card, kind=kind, schema=schema, template=template)
    if labels is None:
        return card
    try:
        schema = AttributeSchema([Attribute(name) for name in labels])
    except ConfigError:  # a label that cannot be an attribute's name, or occurs twice
        schema = AttributeSchema([Attribute(f"LABEL_{i}") for i in range(len(labels))])
    return dataclasses.replace(card, kind="regressor", schema=schema)


def is_ours(folder: Path) -> bool:
    """Whether `export` wrote this folder from a policy or regressor, so that it holds the template."""
    return _STEERLM in hf_config.read_config(folder / "config.json")


def _ends(folder: Path, config: dict[str, Any]) -> list[int]:
    """End-of-text ids of the model: those of generation_config.json, or else of config.json, as in transformers."""
    path = folder / "generation_config.json"
    found = (hf_config.read_config(path) if path.is_file() else config).get("eos_token_id")
    return [token for token in (found if isinstance(found, list) else [found]) if isinstance(token, int)]


def unnamed(schema: AttributeSchema | None) -> bool:
    """Whether these are a classifier's default label names."""
    return schema is not None and all(_UNNAMED.fullmatch(name) for name in schema.names)


def outputs_of(card: ModelCard) -> int | None:
    """Size of a regressor's head, None for a language model."""
    return len(card.schema) if card.kind == "regressor" and card.schema is not None else None


def write_card(folder: Path, card: ModelCard, tokenizer: Tokenizer, dtype: str) -> None:
    """Write everything but the weights into an existing folder.

    A regressor's tokenizer gets a padding token and the chat template that renders the regressor's own prompt, and
    adds no tokens to a text. Its ids are compared with our tokenizer's.

    Args:
        dtype: the type the weights are stored in ("float32", "bfloat16", "float16").

    Raises:
        CheckpointError: transformers tokenises the regressor's prompt differently.
    """
    regressor = card.kind == "regressor" and card.schema is not None
    labels = card.schema.names if regressor and card.schema is not None else None
    data = hf_config.config_from_architecture(card.architecture, dtype, labels)
    ends = list(dict.fromkeys(token for token in (tokenizer.eos_id, *card.ends) if token is not None))
    pad_id = _pad_id(card, tokenizer) if regressor else tokenizer.pad_id
    data |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": pad_id}
    data["eos_token_id"] = ends if len(ends) > 1 else tokenizer.eos_id
    if card.schema is not None:
        data[_STEERLM] = {"attributes": card.schema.to_dict(), "template": card.template.to_dict()}
    _write(folder / "config.json", data)
    tokenizer.save(folder)
    described = folder / "tokenizer_config.json"
    # a bare SentencePiece file: say what it is
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": card.schema is None, "legacy": False}
    if described.is_file():
        settings = json.loads(described.read_text(encoding="utf-8"))
    if tokenizer.file_decides:  # else transformers' class would read other ids
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(described, settings | _INPUTS)
    if regressor:
        _describe_regressor(folder, card, tokenizer)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _describe_regressor(folder: Path, card: ModelCard, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        _convert_sentencepiece(folder)
    file, described = folder / "tokenizer.json", folder / "tokenizer_config.json"
    settings = json.loads(described.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    settings |= {
        "add_bos_token": False, "add_eos_token": False, "padding_side": "right", "truncation_side": "left",
        "model_max_length": card.architecture.max_position_embeddings,
    }  # fmt: skip
    if file.is_file():
        state = json.loads(file.read_text(encoding="utf-8"))
        changed = {"post_processor": _without_special_tokens(state.get("post_processor"))}
        names = card.template.special_names(tokenizer)
        _write(file, state | changed | {"added_tokens": _special(state.get("added_tokens", []), names)})
        settings |= _special_settings(settings, names, frozenset(tokenizer.atoms) - names)
        (folder / "special_tokens_map.json").unlink(missing_ok=True)  # the same again, as it was
    (folder / "chat_template.jinja").write_text(chat_template(card.template), encoding="utf-8")
    _write(described, settings)
    if settings.get("pad_token") is None:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        _write(described, settings | {"pad_token": backend.convert_ids_to_tokens(_pad_id(card, tokenizer))})
    _try_out(AutoTokenizer.from_pretrained(folder, local_files_only=True), folder, card, tokenizer)


def _pad_id(card: ModelCard, tokenizer: Tokenizer) -> int:
    """The id that pads a regressor's batches: the padding token, or another special one where that is a marker."""
    names = card.template.special_names(tokenizer)
    others = sorted(tokenizer.atoms[name] for name in names)
    marker = tokenizer.pad_id in tokenizer.atoms.values() and tokenizer.pad_id not in others
    return others[0] if marker and others else tokenizer.pad_id


def _special(added: list[dict[str, Any]], names: frozenset[str]) -> list[dict[str, Any]]:
    """A tokenizer's added tokens, of which only `names` are special.

    With `split_special_tokens` transformers then reads these names in a text as ordinary characters, as we do, and the
    markers of the chat template still as tokens.
    """
    return [token | {"special": token["content"] in names} for token in added]


def _special_settings(settings: dict[str, Any], names: frozenset[str], plain: frozenset[str]) -> dict[str, Any]:
    """The keys of tokenizer_config.json by which transformers would make `plain` tokens special again."""
    changed: dict[str, Any] = {"split_special_tokens": True}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key)
        if (token["content"] if isinstance(token, dict) else token) in plain:
            changed[key] = None
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            changed[key] = [token for token in settings[key] if token in names]
    if "added_tokens_decoder" in settings:
        tokens = settings["added_tokens_decoder"]
        changed["added_tokens_decoder"] = dict(zip(tokens, _special(list(tokens.values()), names)))
    return changed


def _convert_sentencepiece(folder: Path) -> None:
    """Replace `tokenizer.model` by a `tokenizer.json` that tokenises alike.

    transformers' own conversion leaves out SentencePiece's normalisation (here: its character map, and runs of
    spaces), and reads the names of special tokens in a text as the tokens, which SentencePiece never does (here it
    happens only to a name that stands alone between two user-defined symbols).
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = theirs.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # User-defined symbols are pieces of the normalised text, not tokens that are cut out of it before.
    symbols = [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]
    cut = pre_tokenizers.Split(Regex("|".join(map(re.escape, symbols))), "isolated") if symbols else None
    backend.pre_tokenizer = cut  # None: no cut at all
    backend.model.ignore_merges = bool(symbols)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in symbols]
    _write(folder / "tokenizer.json", state)
    (folder / "tokenizer.model").unlink()
    names = {f"{name}_token": getattr(theirs, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True, **_INPUTS}
    _write(folder / "tokenizer_config.json", settings | {key: name for key, name in names.items() if name is not None})


def _without_special_tokens(processor: Any) -> Any:
    """A `post_processor` of tokenizer.json, without the parts that add tokens to a text."""
    if processor is None or processor["type"] in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if processor["type"] == "Sequence":
        kept = [part for part in map(_without_special_tokens, processor["processors"]) if part is not None]
        return processor | {"processors": kept} if kept else None
    return processor


def _try_out(theirs: Any, folder: Path, card: ModelCard, tokenizer: Tokenizer) -> None:
    """Compare the ids that transformers' tokenizer gives a prompt with ours."""
    template = card.template
    special = " ".join(sorted(template.special_names(tokenizer))[:20])  # ordinary characters in a text
    texts = [f"Hello,  world?\n\n Ünïcode 你好 🙂\t1234 {special}", f" No <s>, {template.label_start}quality:4. "]
    turns = [Turn(template.user, texts[0]), Turn(template.assistant, texts[1])]
    prompt = template.render_regression(Conversation(turns), 1)
    messages = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    ours = template.encode_regression(Conversation(turns), 1, tokenizer)
    pad_id = _pad_id(card, tokenizer)
    if ours[-1] == pad_id:
        raise CheckpointError(
            f"{folder}: the prompt ends with the padding token {theirs.pad_token!r}, where transformers does not look "
            f"for the values; train with another template.label_start"
        )
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    for found, expected, what in (
        (rendered, prompt, "its chat template renders"),
        (theirs(prompt)["input_ids"], ours, "transformers reads"),
        (theirs.pad_token_id, pad_id, "its padding token is"),
    ):
        if found != expected:
            raise CheckpointError(f"{folder}: {what} {found!r:.300}, the regressor was trained on {expected!r:.300}")

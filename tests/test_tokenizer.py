from __future__ import annotations

import json

import pytest

from nemo_steerlm.errors import ConfigError
from nemo_steerlm.tokenizer import load_tokenizer
from tests import tokenizers

TEXTS = ["Hello there", " leading space", "\nline", "\n\n", "  ", "é 😀 ﬁ", "", "a", "x\n", "<extra_id_1>User\n"]


@pytest.fixture(scope="module", params=["bpe", "bpe_markers", "llama_like", "sentencepiece", "sentencepiece_folder"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param.startswith("bpe"):
        return tokenizers.bpe(folder, markers="markers" in request.param)
    if request.param == "llama_like":
        return tokenizers.llama_like(folder)
    model = tokenizers.sentencepiece_model(folder)
    return model.parent if "folder" in request.param else model


def test_text_survives_both_as_start_and_as_continuation(path):
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        assert tokenizer.decode_continuation(tokenizer.encode_continuation(text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        joined = tokenizer.encode("start:") + tokenizer.encode_continuation(text)
        assert tokenizer.decode(joined) == "start:" + text
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_continuations(TEXTS) == [tokenizer.encode_continuation(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == tokenizer.encode_continuations([]) == []


def test_no_begin_or_end_token_and_all_ids_below_vocab_size(path):
    tokenizer = load_tokenizer(path)
    ids = [token for text in TEXTS for token in tokenizer.encode(text)]
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(ids) and max(ids) < tokenizer.vocab_size
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size


def test_saved_copies_are_the_same_tokenizer(path, tmp_path):
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.fingerprint == tokenizer.fingerprint and again.vocab_size == tokenizer.vocab_size
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    again.save(tmp_path / "copy")  # onto itself


def test_ids_of_single_tokens_and_padding(tmp_path):
    tokenizer = load_tokenizer(tokenizers.bpe(tmp_path / "a", markers=True))
    marker = tokenizer.token_id("<extra_id_1>")
    assert marker is not None and tokenizer.decode([marker]) == "<extra_id_1>"
    assert tokenizer.token_id("no such token") is None and tokenizer.token_id("") is None
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (0, 1, None)
    settings = tmp_path / "a" / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert load_tokenizer(tmp_path / "a").pad_id == 0
    settings.unlink()
    bare = load_tokenizer(tmp_path / "a")
    assert bare.fingerprint == tokenizer.fingerprint and bare.eos_id is None


def _folder_of_class(folder, kind):
    """A tokenizer.json of its own, in a folder that names a class of transformers with another pipeline."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    special = {"llama": ["<unk>", "<s>", "</s>"], "qwen2": ["<|b|>", "<|e|>"]}[kind]
    backend = Tokenizer(models.BPE())
    if kind == "llama":  # no dummy space before a text, and no space lost after it
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    else:  # digits by threes, accents as they come
        pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]
        )  # fmt: skip
        backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if kind == "qwen2" else []
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=letters, show_progress=False
    )  # fmt: skip
    backend.train_from_iterator(["2024 1999 123 456 hello world user"] * 9, trainer)
    if kind == "llama":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    backend.save(str(folder / "tokenizer.json"))
    name = {"llama": "LlamaTokenizer", "qwen2": "PreTrainedTokenizerFast"}[kind]
    settings = {"tokenizer_class": name, "bos_token": special[-2], "eos_token": special[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return backend


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_folders_own_file_decides_the_ids(kind, tmp_path):
    theirs = _folder_of_class(tmp_path / "a", kind)
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (tmp_path / "a" / "chat_template.jinja").write_text(chat)
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        ours = load_tokenizer(folder)
        for text in ("in 2024 or 1999", "cafe\u0301", "hello world", " lead", "  two  spaces"):
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert ours.vocab_size == theirs.get_vocab_size() and ours.eos_id == theirs.token_to_id(
            {"llama": "</s>", "qwen2": "<|e|>"}[kind]
        )
        assert ours.render_chat([{"role": "user", "content": "Hi"}], prompt=True) == "user: Hi"


def test_tokens_that_only_the_description_has_are_refused_where_the_file_decides(tmp_path):
    backend = _folder_of_class(tmp_path, "llama")
    size = backend.get_vocab_size()
    path = tmp_path / "tokenizer_config.json"
    more = {"added_tokens_decoder": {str(size): {"content": "<|im_end|>", "special": True}}}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    with pytest.raises(ConfigError, match=rf"has the token '<\|im_end\|>' under {size}, tokenizer.json has None"):
        load_tokenizer(tmp_path)


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    plain = load_tokenizer(tokenizers.bpe(tmp_path / "a", markers=False))
    marked = load_tokenizer(tokenizers.bpe(tmp_path / "b", markers=True))
    folded = load_tokenizer(tokenizers.bpe(tmp_path / "c", markers=True, normalizer="Lowercase"))
    assert len({plain.fingerprint, marked.fingerprint, folded.fingerprint}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "no such file or folder"),
        ("empty/", None, "neither tokenizer.json nor tokenizer.model"),
        ("notes.txt", b"x", "expected a folder or a SentencePiece .model file"),
        ("tokenizer.model", b"not a model", "not a SentencePiece model"),
        ("folder/tokenizer.json", b"{}", "cannot be read"),
    ],
)
def test_wrong_paths_are_refused(name, content, message, tmp_path):
    path = tmp_path / (name or "missing")
    if name:
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(path.parent if path.parent.name == "folder" else path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.real_data
def test_the_real_llama_sentencepiece_model():
    tokenizer = load_tokenizer(tokenizers.real_data("stories260K/tok512.model"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    assert tokenizer.encode("a") != tokenizer.encode_continuation("a")  # no dummy space inside a prompt
    assert len(tokenizer.encode_continuation("<extra_id_1>")) > 5 and tokenizer.token_id("<extra_id_1>") is None
    assert tokenizer.decode_continuation(tokenizer.encode_continuation(" Once")) == " Once"


def test_added_tokens_beside_a_sentencepiece_model_are_refused(tmp_path):
    file = tokenizers.sentencepiece_model(tmp_path)
    size = load_tokenizer(file).vocab_size
    known = {"added_tokens_decoder": {"1": {"content": "<s>"}, "2": {"content": "</s>"}}}  # as Llama 2's folder says
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(known))
    assert load_tokenizer(tmp_path).vocab_size == size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    with pytest.raises(ConfigError, match=rf"added tokens that tokenizer.model does not hold \('\[PAD\]' {size}\)"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(file).vocab_size == size  # without them, as told
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"5": {"content": "<x>"}}}))
    with pytest.raises(ConfigError, match="'<x>' 5"):
        load_tokenizer(tmp_path)


def test_ids_without_a_token_are_known(tmp_path):
    from tokenizers import Tokenizer, models

    assert load_tokenizer(tokenizers.bpe(tmp_path / "bpe", markers=True)).holes == []
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 4}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert (load_tokenizer(tmp_path).vocab_size, load_tokenizer(tmp_path).holes) == (5, [2, 3])

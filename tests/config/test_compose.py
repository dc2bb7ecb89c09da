from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from omegaconf import OmegaConf

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import compose
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.terminal import shell_word

FILES = sorted(compose.conf_folder().rglob("*.yaml"))
SFT = [
    "data.train=t.jsonl",
    "output=o",
    "optimizer.lr=1e-3",
    "trainer.max_steps=4",
    "attributes=helpsteer",
    "model.init=m",
]


def load(verb, words, **kwargs):
    return compose.load(verb, getattr(config, VERBS[verb][1]), words, **kwargs)


def header_commands(text):
    return re.findall(r"^#   (?:srun )?steerlm (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(compose.conf_folder())))
def test_every_shipped_file_composes_by_the_command_in_its_header(file):
    commands = header_commands(file.read_text())
    assert commands, "the header shows the exact command"
    group, name = file.parent.name, file.stem
    for command in commands:
        verb, *words = shlex.split(command)
        assert name == verb or f"{group}={name}" in words
        settings = load(verb, words)
        if group == "model":
            assert settings.model.architecture.num_layers > 0
        if group == "attributes":
            assert settings.attributes.preset == name


def test_every_verb_has_a_root_file_and_every_root_file_a_verb():
    assert {file.stem for file in compose.conf_folder().glob("*.yaml")} == set(VERBS)


def test_values_of_the_command_line_win_over_the_experiment_and_that_over_the_groups():
    words = [
        "experiment=llama2_13b-sft-oasst-8xh100_80g",
        "model.init=m",
        "data.train=t.jsonl",
        "output=o",
        "optimizer.lr=1e-3",
    ]
    settings = load("train-sft", words)
    assert isinstance(settings, config.TrainSftConfig)
    assert (settings.trainer.max_epochs, settings.trainer.devices, settings.parallel.tensor) == (5.0, 8, 4)
    assert settings.attributes.require().names[0] == "quality"
    assert settings.optimizer.lr == 1e-3 and settings.optimizer.beta2 == 0.98
    assert settings.template.end_of_turn == "\n"


def test_training_data_is_a_file_or_a_list_of_files():
    words = [word for word in SFT if not word.startswith("data.train")]
    assert load("train-sft", [*words, "data.train=/a b/c=d.jsonl"]).data.train_files() == ["/a b/c=d.jsonl"]
    data = load("train-regressor", [*words, "data.train=[one.jsonl,two.jsonl]", "data.weights=[1,0.5]"]).data
    assert data.train_files() == ["one.jsonl", "two.jsonl"] and data.weights == [1.0, 0.5] and data.val_files() == []
    for word, message in (
        ("data.train=[]", "data.train=.*expected a file, or a list of files"),
        ("data.val=[]", "data.val=.*expected a file, or a list of files"),
        ("data.weights=[1,2]", "data.weights=.*expected one number above 0 for each of the 1 files of data.train"),
        ("data.weights=[0]", "data.weights=.*expected one number above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load("train-sft", [*words, "data.train=t.jsonl", word])


def test_free_text_needs_no_quoting_and_mappings_take_new_keys():
    words = [
        "checkpoint=/a b/c=d",
        "prompt=What's 2 + 2, roughly? [a, {b}",
        "attributes.humor=4",
        "attributes.calm=1.5",
    ]
    settings = load("generate", words)
    assert settings.checkpoint == "/a b/c=d"
    assert settings.prompt == "What's 2 + 2, roughly? [a, {b}"
    assert settings.attributes == {"humor": 4.0, "calm": 1.5}
    assert settings.system is None and load("generate", [*words, "system='null'"]).system == "null"


TYPED = (
    "1e3", "1_000", "1.50", "2024_01", "true", "null", "'quoted'", '"Hello"', "int(3.7)", "Hi\\, there", "+5",
    "  lead ", "What is ${HOME}?", "${oc.env:HOME}", "\\${a", "[1,2]", "{a: 1}", "a=b", "", "C:\\x",
)  # fmt: skip


@pytest.mark.parametrize("text", TYPED)
def test_text_arrives_as_it_is_typed(text):
    settings = load("generate", ["checkpoint=m", f"prompt={text}", f"system={text}"])
    assert settings.prompt == text and settings.system == (None if text == "null" else text)
    quoted = "'" + text.strip() + "'" if "'" not in text else f'"{text}"'
    words = ["source=table", "check=true", f"columns.prompt={text}"]
    words += [f"columns={{response: {quoted},quality: Politeness (1-5)}}"]
    columns = load("prepare", [*words, f"output={text}", f"languages=[{quoted},no,1]"])
    assert columns.columns == {"prompt": text, "response": quoted[1:-1], "quality": "Politeness (1-5)"}
    assert columns.output == (None if text == "null" else text) and columns.languages == [quoted[1:-1], "no", "1"]
    words = [*SFT[1:], f"data.train=[{quoted},1e3]", f"attributes.schema.humor.description={text}"]
    settings = load("train-sft", words)
    assert settings.data.train == [quoted[1:-1], "1e3"]
    assert settings.attributes.schema["humor"].description == (None if text == "null" else text)


def test_a_mapping_of_texts_that_lacks_a_colon_is_refused():
    with pytest.raises(ConfigError, match="columns=.*'Politeness' is not of the form name:text"):
        load("prepare", ["source=table", "columns={prompt:ask,Politeness}"])


def test_attributes_are_taken_from_the_users_file_and_changed_in_place(tmp_path):
    (tmp_path / "mine.yaml").write_text("calm: {low: 0, high: 2}\n")
    words = [*SFT[:4], "model.init=m", f"attributes={tmp_path}/mine.yaml", "attributes.schema.humor.high=9"]
    schema = load("train-sft", words).attributes.require()
    assert [(one.name, one.high) for one in schema] == [("calm", 2), ("humor", 9)]


def test_a_folder_of_the_users_own_groups_is_searched_too(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "small.yaml").write_text(
        "architecture: {num_layers: 3, hidden_size: 96}\ntokenizer: t.model\n"
    )
    words = [*SFT[:5], "model=small"]
    assert load("train-sft", words, config_dir=tmp_path).model.architecture.num_layers == 3
    assert (
        load(
            "train-sft", [*words, "model.architecture.num_layers=5"], config_dir=tmp_path
        ).model.architecture.num_layers
        == 5
    )
    with pytest.raises(ConfigError, match="model=small: no such choice; there are .*llama_tiny"):
        load("train-sft", words)
    with pytest.raises(ConfigError, match="--config-dir .*nowhere: no such folder"):
        load("train-sft", words, config_dir=tmp_path / "nowhere")


WRONG = {
    "unknown": (["seeed=1"], "unknown key 'seeed'; did you mean 'seed'"),
    "unknown, nested": (["trainer.max_step=1"], "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'"),
    "unknown, no branch": (["max_steps=1"], "unknown key 'max_steps'; did you mean 'trainer.max_steps'"),
    "added": (["+trainer.foo=1"], "unknown key 'trainer.foo'; --help lists the keys"),
    "added twice": (["++foo=1"], "unknown key 'foo'"),
    "in a mapping value": (["optimizer={lr: 1, foo: 2}"], "unknown key 'optimizer.foo'"),
    "below a leaf": (["seed.x=1"], "unknown key 'seed.x'"),
    "removed": (["~trainer"], "'~trainer' is not of the form key=value"),
    "no value": (["trainer"], "'trainer' is not of the form key=value"),
    "type": (["trainer.max_steps=abc"], r"trainer.max_steps: Value 'abc'.*expected int or null"),
    "float for int": (["seed=1.5"], "seed: Value '1.5'.*expected int"),
    "null for a number": (["seed=null"], "seed: .*expected int"),
    "sweep": (["seed=1,2"], r"seed=1,2: expected one value; lists are written seed=\[1,2\]"),
    "malformed list": (["seed=[1"], r"seed=\[1: "),
    "choice": (["trainer.precision=fp16"], "trainer.precision=fp16: expected one of fp32, bf16, fp8"),
    "choice, suggestion": (
        ["data.overlong=dropp"],
        "expected one of truncate_history, drop, error; did you mean 'drop'",
    ),
    "too small": (["trainer.devices=0"], "trainer.devices=0: expected at least 1"),
    "not a number": (["optimizer.clip_grad=nan"], "optimizer.clip_grad=nan: expected a finite number"),
    "infinite": (["optimizer.lr=inf"], "optimizer.lr=inf: expected a finite number"),
    "infinite in a list": (["data.train=[a,b]", "data.weights=[1,inf]"], r"data.weights\[1\]=inf: expected a finite"),
    "negative seed": (["seed=-1"], "seed=-1: expected at least 0"),
    "seed too large": (["seed=4294967296"], "seed=4294967296: expected at most 4294967295"),
    "first moment": (["optimizer.beta1=1"], "optimizer.beta1=1.0: expected less than 1"),
    "second moment": (["optimizer.beta2=1.0"], "optimizer.beta2=1.0: expected less than 1"),
    "average": (["optimizer.ema_decay=1"], "optimizer.ema_decay=1.0: expected less than 1"),
    "denominator": (["optimizer.eps=0"], "optimizer.eps=0.0: expected at least 1e-20"),
    "bad steps": (["trainer.max_bad_steps=0"], "trainer.max_bad_steps=0: expected at least 1"),
    "too large": (["data.label_dropout=1.5"], "data.label_dropout=1.5: expected at most 1"),
    "group": (["attributes=helpster"], "attributes=helpster: no such choice; .*did you mean 'helpsteer'"),
    "file": (["attributes=/nowhere.yaml"], "/nowhere.yaml"),
    "preset": (["attributes.preset=helpster"], "attributes=helpster: .*did you mean 'helpsteer'"),
    "schema": (["attributes.schema.humor.hig=3"], "unknown key 'attributes.schema.humor.hig'"),
    "layout": (["parallel=tp2"], "is 1, expected a multiple of parallel.tensor=2 x parallel.pipeline=1 = 2"),
    "sequence": (["parallel.sequence=true"], "parallel.sequence=true needs parallel.tensor of at least 2"),
    "virtual": (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline needs parallel.pipeline of at least 2"),
    "batch": (
        ["trainer.devices=2", "trainer.global_batch_size=6", "trainer.micro_batch_size=2"],
        "trainer.global_batch_size=6 is not a multiple of trainer.micro_batch_size=2 x 2 data-parallel ranks = 4",
    ),
    "interleaved batch": (
        ["parallel=pp2_vpp2", "trainer.devices=2", "trainer.global_batch_size=3"],
        "micro-batches in multiples of parallel.pipeline=2, found 3",
    ),
    "no end": (["trainer.max_steps=null"], "trainer.max_steps is missing; give it or trainer.max_epochs"),
    "two models": (["model=llama_tiny"], "model.init=m brings its own architecture"),
    "no model": (["model.init=null"], "model.init is missing; .*model=llama_tiny"),
    "no tokenizer": (["model.init=null", "model=llama_tiny"], "model.tokenizer is missing"),
    "no rate": (
        ["model.init=null", "model=llama_tiny", "model.tokenizer=t", "optimizer.lr=null"],
        "optimizer.lr is missing: no default suits random weights; give one, e.g. optimizer.lr=1e-3",
    ),
    "template": (["template.turn_start=<extra_id_2>"], "overlap"),
    "no attributes": (["attributes=null"], "attributes is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_that_names_the_key(name):
    words, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as caught:
        load("train-sft", [*SFT, *words])
    assert "\n" not in str(caught.value)


def test_the_default_rate_is_that_of_what_is_trained_and_help_tells_it():
    without = [word for word in SFT if "optimizer.lr" not in word]
    assert config.default_rate(load("train-sft", without)) == (1e-5, "full fine-tuning")
    assert config.default_rate(load("train-sft", [*without, "model.lora.rank=8"])) == (1e-4, "LoRA")
    with pytest.raises(ConfigError, match="optimizer.lr is missing: no default suits model.freeze=trunk"):
        load("train-regressor", [*without, "model.freeze=trunk"])
    help_ = compose.describe("train-sft", config.TrainSftConfig, [])
    assert re.search(r"optimizer.lr=null +peak .* null = 1e-05 for full fine-tuning, 0.0001 for LoRA", help_)
    assert load("train-sft", [*without, "optimizer=adamw_cosine"]).optimizer.lr == 9e-6


READERS = {
    "annotate": ["checkpoint=m", "input=i.jsonl", "output=o"],
    "sample": ["checkpoint=m", "prompts=p.jsonl", "annotated=a.jsonl", "target=[humor]", "output=o"],
    "generate": ["checkpoint=m", "prompt=Hi"],
    "evaluate": ["task=regressor", "checkpoint=m", "input=i.jsonl", "output=o"],
    "bootstrap": ["policy=p", "regressor=r", "target=[humor]", *SFT[:4], "data.val=v.jsonl"],
}


@pytest.mark.parametrize("verb", READERS)
def test_what_reads_or_generates_does_so_not_in_fp8(verb):
    load(verb, [*READERS[verb], "trainer.precision=bf16"])
    with pytest.raises(ConfigError, match="trainer.precision=fp8 is for train-regressor and train-sft"):
        load(verb, [*READERS[verb], "trainer.precision=fp8"])


def test_mandatory_values_are_named_with_an_example():
    with pytest.raises(ConfigError) as caught:
        load("train-sft", SFT[1:3])
    assert str(caught.value) == "data.train is missing; give it on the command line, e.g. data.train=data/train.jsonl"
    with pytest.raises(ConfigError, match=r"e.g. checkpoint=.* \(also missing: input, output\)"):
        load("annotate", [])


def test_groups_belong_to_the_verbs_that_use_them():
    with pytest.raises(ConfigError, match="unknown key 'model'"):
        load("prepare", ["source=oasst", "output=o", "model=llama_tiny"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_key_once_and_no_more(verb):
    schema = getattr(config, VERBS[verb][1])
    shown = re.findall(r"^  ([\w.]+)=", compose.describe(verb, schema, []).partition("keys:")[2], flags=re.MULTILINE)
    every = list(compose.keys(schema))
    branches = {key.rpartition(".")[0] for key in every}
    # twenty keys that a group fills, and what import has by default: no template
    folded = "template" if verb == "import" else "model.architecture"
    assert shown == [key for key in every if key == folded or not (key in branches or key.startswith(f"{folded}."))]


def through_bash(words):
    """The words that bash makes of what is typed."""
    script = "printf '%s\\0' " + " ".join(words)
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


NASTY = (
    "it's", 'say "hi"', "a\tb\n", "back\\nslash", "$HOME `ls` !x *", "\x01\x1b[0m 7", "É 😀 \u200b", "", " lead",
    "a\\'b\n",
)  # fmt: skip


CHANGED = {
    "train-sft": ["attributes.schema.humor.high=9", "optimizer.lr=3.14159265e-6", "data.weights=[1,0.333333333]"],
    "train-regressor": ["loss.weights={humor: 0.125,quality: 1234567.5}", "model.lora.targets=[linear_qkv]"],
    "prepare": ["columns={prompt: 'a, b',response: it's}", "languages=[en,'no','a, b']"],
    "sample": ["target=[quality,it's]", "checkpoint=a b"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_help_prints_can_be_typed_back(verb):
    schema = getattr(config, VERBS[verb][1])
    for words in ([], CHANGED.get(verb, [])):
        printed = compose.describe(verb, schema, words).partition("keys:")[2]
        rows = re.findall(r"""^  ([\w.]+=(?:\$?'(?:[^'\\]|\\.)*'|"[^"]*"|[^\s'"])*)""", printed, flags=re.MULTILINE)
        typed = through_bash([row for row in rows if not row.endswith("=required")])
        again, expected = (compose.draft(verb, schema, given) for given in (typed, words))
        assert again == expected
    assert verb not in CHANGED or again != compose.draft(verb, schema, [])


@pytest.mark.parametrize("text", NASTY)
def test_any_text_that_help_prints_can_be_typed_back(text):
    for key in ("template.end_of_turn", "data.train", "model.init"):
        words = [*(word for word in SFT if not word.startswith(key)), f"{key}={text}"]
        printed = compose.describe("train-sft", config.TrainSftConfig, words)
        [row] = [row for row in printed.splitlines() if row.startswith(f"  {key}=")]
        word = shell_word(text)
        assert row.startswith(f"  {key}={word}") and row.isprintable()
        assert through_bash([f"{key}={word}"]) == [f"{key}={text}"]
        settings = compose.draft("train-sft", config.TrainSftConfig, [f"{key}={text}"])
        assert OmegaConf.select(settings, key) == text


def test_the_line_end_of_the_template_is_typed_as_a_line_end():
    assert "  template.end_of_turn=$'\\n' " in compose.describe("train-sft", config.TrainSftConfig, [])
    assert "  template.turn_start='<extra_id_1>' " in compose.describe("train-sft", config.TrainSftConfig, [])
    assert through_bash(["template.end_of_turn=$'\\n'"]) == ["template.end_of_turn=\n"]


def test_a_packed_batch_is_cut_by_tokens():
    batch = ["trainer.global_batch_size=6", "trainer.micro_batch_size=4"]
    with pytest.raises(ConfigError, match="trainer.global_batch_size=6 is not a multiple of"):
        load("train-sft", SFT + batch)
    words = SFT + batch + ["data.max_length=300", "data.packing=true"]
    assert load("train-sft", words).data.row_length() == 300
    assert load("train-sft", [*words, "data.pack_length=512"]).data.row_length() == 512
    assert load("train-sft", SFT + ["trainer=cpu", "data.pack_length=512"]).data.row_length() is None
    with pytest.raises(ConfigError, match="data.pack_length=256 is smaller than data.max_length=300: a sample must"):
        load("train-sft", [*words, "data.pack_length=256"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["loss.weights.humor=nan"], "loss.weights.humor=nan: expected a finite number"),
        (["loss.weights.humor=-1"], "loss.weights.humor=-1.0: expected at least 0"),
    ],
)
def test_numbers_in_a_mapping_are_checked(words, message):
    with pytest.raises(ConfigError, match=message):
        load("train-regressor", [*SFT, *words])


def test_a_typed_config_is_checked_as_a_command_line_is():
    settings = load("train-sft", SFT)
    settings.optimizer.clip_grad = float("nan")
    with pytest.raises(ConfigError, match="optimizer.clip_grad=nan: expected a finite number"):
        settings.validate()


@pytest.mark.parametrize("verb", VERBS)
def test_every_seed_has_a_range(verb):
    schema = getattr(config, VERBS[verb][1])
    for key in compose.keys(schema):
        if key.rpartition(".")[2] == "seed":
            rules = compose.find(schema, key).metadata
            assert (rules["least"], rules["most"]) == (0, 2**32 - 1), key

from __future__ import annotations

import re
import shlex

import pytest

from nemo_steerlm import config
from nemo_steerlm.cli import VERBS
from nemo_steerlm.config import cluster, compose, plan
from nemo_steerlm.config.primary import conf_folder
from nemo_steerlm.config.schema import find, keys
from nemo_steerlm.errors import ConfigError

DIVIDED = {"plan": plan.divide, "submit": cluster.divide}
FILES = sorted(conf_folder().rglob("*.yaml"))
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(conf_folder())))
def test_every_shipped_file_composes_by_the_command_in_its_header(file):
    commands = header_commands(file.read_text())
    assert commands, "the header shows the exact command"
    group, name = file.parent.name, file.stem
    for command in commands:
        verb, *words = shlex.split(command)
        if verb in DIVIDED:  # a verb and its own words follow
            words, _ = DIVIDED[verb](words)
        assert name == verb or f"{group}={name}" in words
        settings = load(verb, words)
        if group == "model":
            assert settings.model.architecture.num_layers > 0
        if group == "attributes":
            assert settings.attributes.preset == name


def test_every_verb_has_a_root_file_and_every_root_file_a_verb():
    assert {file.stem for file in conf_folder().glob("*.yaml")} == set(VERBS)


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
    "group removed": (["~trainer"], r"trainer.global_batch_size is missing; .*also missing: trainer.micro_batch_size"),
    "key removed": (["~data.train"], "data.train is missing"),
    "removed, unknown": (["~trainer.max_step"], "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'"),
    "removed, value": (["~trainer.max_steps=4"], "write ~trainer.max_steps, whatever its value is"),
    "package": (["model@other=llama_tiny"], "a group fills one section here; write model=llama_tiny"),
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
    "time": (["trainer.max_time=90"], "trainer.max_time=90: expected HH:MM:SS or DD:HH:MM:SS"),
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


def test_the_default_rate_is_that_of_what_is_trained():
    without = [word for word in SFT if "optimizer.lr" not in word]
    assert config.default_rate(load("train-sft", without)) == (1e-5, "full fine-tuning")
    assert config.default_rate(load("train-sft", [*without, "model.lora.rank=8"])) == (1e-4, "LoRA")
    with pytest.raises(ConfigError, match="optimizer.lr is missing: no default suits model.freeze=trunk"):
        load("train-regressor", [*without, "model.freeze=trunk"])
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
    for key in keys(schema):
        if key.rpartition(".")[2] == "seed":
            rules = find(schema, key).metadata
            assert (rules["least"], rules["most"]) == (0, 2**32 - 1), key

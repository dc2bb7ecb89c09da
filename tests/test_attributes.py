from __future__ import annotations

import math

import pytest

from nemo_steerlm.attributes import PRESETS, Attribute, AttributeSchema, format_number, parse_label
from nemo_steerlm.errors import ConfigError, DataError

HELPSTEER = AttributeSchema.load("helpsteer")


def test_presets_hold_the_published_names_order_and_ranges():
    assert HELPSTEER.names == tuple(
        "quality toxicity humor creativity helpfulness correctness coherence complexity verbosity".split()
    )
    assert AttributeSchema.load("helpsteer2").names == HELPSTEER.names[4:]
    paper = AttributeSchema.load("oasst_0_9")
    assert paper.names == tuple("quality toxicity humor creativity violence helpfulness not_appropriate".split())
    assert {(a.low, a.high) for a in paper} == {(0, 9)}
    assert AttributeSchema.load("synthetic").names == tuple("quality helpfulness verbosity humor toxicity".split())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_schema_survives_its_file(preset, tmp_path):
    schema = AttributeSchema.load(preset)
    schema.save(tmp_path / "attributes.yaml")
    again = AttributeSchema.load(tmp_path / "attributes.yaml")
    assert again == schema and again.to_dict() == schema.to_dict()
    assert AttributeSchema.load(schema.to_dict()) == schema


def test_a_schema_of_ones_own_from_yaml(tmp_path):
    (tmp_path / "mine.yaml").write_text("formality: {low: 1, high: 5, default: 3, description: tone}\nhumor:\n")
    schema = AttributeSchema.load(tmp_path / "mine.yaml")
    assert schema.defaults() == {"formality": 3.0, "humor": 2.0}  # the middle where a file names none
    assert schema["formality"].description == "tone"
    assert schema.format({"humor": 9, "formality": 0}) == "formality:1,humor:4"


def test_half_even_rounding_clamping_and_missing_values():
    values = {
        "toxicity": 0.5,
        "quality": 2.5,
        "humor": 3.5,
        "creativity": -1.0,
        "helpfulness": math.nan,
        "verbosity": 7.2,
    }
    assert HELPSTEER.format(values) == "quality:2,toxicity:0,humor:4,creativity:0,verbosity:4"
    assert HELPSTEER.format({}) == HELPSTEER.format(None) == ""


def test_vector_and_back_leave_missing_values_out():
    vector = HELPSTEER.vector({"humor": 3.25, "quality": 1})
    assert vector[:3] == [1.0, pytest.approx(math.nan, nan_ok=True), 3.25] and sum(map(math.isnan, vector)) == 7
    assert HELPSTEER.values(vector) == {"quality": 1.0, "humor": 3.25}
    with pytest.raises(DataError, match="label of 2 values"):
        HELPSTEER.values([1.0, 2.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qualty:4", "rows.jsonl:7: unknown attribute 'qualty'; did you mean 'quality'?"),
        ("Humour:4", "did you mean 'humor'?"),
        ("quality:5", "attribute 'quality' is 5, outside its range 0 to 4"),
        ("quality:-1", "outside its range"),
        ("quality:4,quality:4", "gives attribute 'quality' twice"),
        ("quality:high", "malformed at 'quality:high'"),
        ("quality:nan", "malformed"),
        ("quality:inf", "malformed"),
        ("quality", "malformed"),
        ("quality:4,", "malformed at ''"),
        ("", "malformed"),
    ],
)
def test_bad_labels_say_what_and_where(text, message):
    with pytest.raises(DataError) as error:
        HELPSTEER.parse(text, "rows.jsonl:7")
    assert (
        str(error.value).startswith("rows.jsonl:7: ") and message in str(error.value) and "\n" not in str(error.value)
    )


def test_labels_without_a_schema():
    assert parse_label(" quality:4 , my.own-one:0.5") == {"quality": 4.0, "my.own-one": 0.5}
    assert [format_number(x) for x in (4.0, 3.5, 1 / 3, -2)] == ["4", "3.5", "0.3333", "-2"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("helpster", "did you mean 'helpsteer'?"),
        ({}, "empty"),
        ({"a,b": None}, "not usable"),
        ({"a": {"lo": 0}}, "unknown key 'lo'; did you mean 'low'?"),
        ({"a": {"low": 4, "high": 4}}, "must be below"),
        ({"a": {"low": 0.5}}, "must be an integer"),
        ({"a": {"default": 9}}, "outside its range"),
        ({"a": 3}, "must hold a mapping"),
    ],
)
def test_bad_schemas_are_refused(source, message):
    with pytest.raises(ConfigError) as error:
        AttributeSchema.load(source)
    assert message in str(error.value)


def test_unknown_names_never_vanish():
    for call in (HELPSTEER.format, HELPSTEER.vector, HELPSTEER.clamp, HELPSTEER.check):
        with pytest.raises(DataError, match="did you mean 'verbosity'"):
            call({"verbosty": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'verbosity'"):
        HELPSTEER["verbosty"]


def test_equality_is_names_ranges_and_order():
    one, two = Attribute("a"), Attribute("b", description="other words")
    assert AttributeSchema([one, two]) == AttributeSchema([one, Attribute("b", default=2)])
    assert AttributeSchema([one, two]) != AttributeSchema([two, one])
    assert AttributeSchema([one]) != AttributeSchema([Attribute("a", high=9)])


def test_what_is_not_asked_for_takes_its_default():
    schema = AttributeSchema.load("helpsteer")
    published = "quality:4,toxicity:0,humor:0,creativity:0," + ",".join(
        f"{name}:4" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    )
    assert schema.format(schema.complete(None)) == schema.format(schema.complete({})) == published
    assert schema.format(schema.complete({"humor": 4})) == published.replace("humor:0", "humor:4")
    assert "humor" not in schema.complete({"humor": None}) and len(schema.complete({"humor": None})) == 8
    assert schema.complete(dict.fromkeys(schema.names)) == {}
    for asked in ({"humour": 4}, {"humour": None}):
        with pytest.raises(ConfigError, match="did you mean 'humor'"):
            schema.complete(asked)
    with pytest.raises(DataError, match="'humor' is 9"):
        schema.complete({"humor": 9})

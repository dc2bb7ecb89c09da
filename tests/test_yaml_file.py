from __future__ import annotations

import pytest

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.yaml_file import read_yaml

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{two}: &{two} [{','.join(['*' + one] * 9)}]\n" for one, two in zip("abcdefgh", "bcdefghi")
)
HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "aliases": (LAUGHS, r"alias \*a, write the value out .*line 2"),
    "merge": ("base: &b {low: 0}\nhumor: {<<: *b}\n", r"alias \*b"),
    "a key twice": ("humor: {high: 9}\nquality:\nhumor:\n", r"the key 'humor' is there twice .*line 3"),
    "a key twice inside": ("humor: {high: 9, high: 4}\n", "the key 'high' is there twice"),
    "nesting": ("[" * 5000, "nested more than 20 deep"),
    "nested blocks": ("".join(" " * n + "a:\n" for n in range(400)), "nested more than 20 deep"),
    "a tag": ("humor: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "size": ("#" * (2 << 20), "2,097,152 bytes, expected a small YAML file"),
    "bytes": (b"\xff\xfe\x00", "not a YAML file"),
    "a date": ("humor: 2024-99-99\n", "not a YAML file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "a.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        AttributeSchema.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("high: .inf", "high must be an integer, found inf"),
        ("low: -.inf", "low must be an integer, found -inf"),
        ("high: .nan", "high must be an integer, found nan"),
        ("high: 1.0e+300", "is more than 1000 steps"),
        ("high: 1000000000", "0 to 1000000000 is more than 1000 steps"),
        ("high: " + "9" * 400, "is more than 1000 steps"),
    ],
)
def test_ranges_are_finite_and_small(settings, message, tmp_path):
    (tmp_path / "a.yaml").write_text(f"humor: {{{settings}}}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        AttributeSchema.load(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_plain_files_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("humor: {low: 1, high: 5}\nlist: [1, {a: b}]\ntext: '&x *x'\n")
    found = read_yaml(tmp_path / "a.yaml", ConfigError)
    assert found == {"humor": {"low": 1, "high": 5}, "list": [1, {"a": "b"}], "text": "&x *x"}

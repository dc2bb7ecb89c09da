from __future__ import annotations

import hashlib
import json

import pytest
from omegaconf import OmegaConf

from nemo_steerlm.attributes import AttributeSchema
from nemo_steerlm.errors import DataError
from nemo_steerlm.provenance import read_run_json, write_run_json


def test_run_json_holds_config_versions_inputs_and_schema(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(b"abc")
    (tmp_path / "in" / "deep" / "b").write_bytes(b"")
    config = OmegaConf.create({"data": {"train": "x", "languages": ["en"]}, "seed": 3, "twice": "${seed}"})
    schema = AttributeSchema.load("helpsteer2")
    write_run_json(tmp_path, "annotate", config, [tmp_path / "in"], schema, rows=4)
    content = read_run_json(tmp_path)
    assert content["verb"] == "annotate" and content["rows"] == 4
    assert content["config"] == {"data": {"train": "x", "languages": ["en"]}, "seed": 3, "twice": 3}
    assert AttributeSchema.load(content["attributes"]) == schema
    assert {"python", "nemo_steerlm", "torch"} <= set(content["versions"])
    assert [(entry["bytes"], entry["sha256"]) for entry in content["inputs"]] == [
        (len(data), hashlib.sha256(data).hexdigest()) for data in (b"abc", b"")
    ]


def test_a_missing_or_broken_run_json_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_run_json(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="malformed"):
        read_run_json(tmp_path)


def test_dataclasses_are_unfolded(tmp_path):
    from nemo_steerlm.config import PrepareConfig

    write_run_json(tmp_path, "prepare", PrepareConfig(source="oasst", output=str(tmp_path)))
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert config["output"] == str(tmp_path) and config["val_fraction"] == 0.05 and config["languages"] is None

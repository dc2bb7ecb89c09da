"""A model folder or run folder of someone else runs nothing, over every way in, and is refused in one line."""

from __future__ import annotations

import io
import pickle  # noqa: TID251 (to make what must be refused)
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nemo_steerlm.config import AnnotateConfig, ExportConfig, RegressorModelConfig
from nemo_steerlm.integrity import write_sums
from tests.distributed import run_distributed
from tests.verbs.helpers import make_world, regressor_config

CRAFTS = ("index", "object", "extra state", "tensor as object", "common")
WAYS = (
    "annotate", "export", "from_pretrained", "restore_from", "model.init", "resume", "stored_names", "stored_dtype",
)  # fmt: skip
BARE_INDEX = ("stored_names", "stored_dtype")  # read nothing but the index


class Payload:
    """Unpickled, it makes a file: harmless, and seen."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


def craft(weights: Path, kind: str, marker: Path) -> None:
    """Make a checkpoint hostile in one place."""
    payload = Payload(marker)
    if kind == "common":
        torch.save({"common": payload}, weights / "common.pt")
        return
    path = weights / ".metadata"
    if kind == "index":
        path.write_bytes(pickle.dumps(payload))
        return
    index = pickle.loads(path.read_bytes())  # noqa: S301 (our own)
    name = next(n for n, kept in index.state_dict_metadata.items() if "_extra_state" in n)
    if kind == "tensor as object":
        name = "decoder.final_layernorm.weight"
        index.state_dict_metadata[name] = BytesStorageMetadata()
    data: Any = payload
    if kind == "extra state":  # Transformer Engine unpickles a tensor of bytes
        data = torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)
    torch.save([data], weights / "__9_0.distcp")
    for key, info in index.storage_data.items():
        if key.fqn == name:
            info.relative_path, info.offset = "__9_0.distcp", 0
            info.length = (weights / "__9_0.distcp").stat().st_size
    path.write_bytes(pickle.dumps(index))


def open_all(folder: str) -> dict[str, str]:
    """Train two steps; then every craft over every way in: the error, or "read"."""
    root = Path(folder)
    from nemo_steerlm.verbs import train_regressor

    make_world(root)
    train_regressor.main(regressor_config(root, steps=2))
    found = {}
    for kind in CRAFTS:
        shutil.copytree(root / "regressor", root / kind)
        for weights in ("model/weights", "checkpoints/step-00000002"):
            craft(root / kind / weights, kind, root / f"marker {kind}")
            write_sums(root / kind / weights)  # whoever made the folder made its list
        write_sums(root / kind / "model")
        with tarfile.open(root / f"{kind}.nemo", "w") as archive:
            archive.add(root / kind / "model", arcname=".")
        for way in WAYS:
            try:
                _ways(root, root / kind)[way]()
                found[f"{kind} / {way}"] = "read"
            except BaseException as error:
                found[f"{kind} / {way}"] = f"{type(error).__name__}: {error}"
            if (root / f"marker {kind}").exists():
                found[f"{kind} / {way}"] = "RAN"
                (root / f"marker {kind}").unlink()
    return found


def _ways(root: Path, run: Path) -> dict[str, Callable[[], Any]]:
    from nemo_steerlm.megatron import checkpoint
    from nemo_steerlm.models.regressor import AttributeRegressor
    from nemo_steerlm.verbs import annotate, convert, train_regressor

    model, data = str(run / "model"), str(root / "data/test.jsonl")
    init = RegressorModelConfig(init=model)
    return {
        "annotate": lambda: annotate.main(
            AnnotateConfig(checkpoint=model, input=data, output=str(root / "annotated.jsonl"))
        ),
        "export": lambda: convert.export_main(ExportConfig(checkpoint=model, output=str(root / "exported"))),
        "from_pretrained": lambda: AttributeRegressor.from_pretrained(model),
        "restore_from": lambda: AttributeRegressor.restore_from(f"{run}.nemo"),
        "model.init": lambda: train_regressor.main(regressor_config(root, "other", steps=1, model=init)),
        "resume": lambda: train_regressor.main(regressor_config(root, run.name, steps=4)),
        "stored_names": lambda: checkpoint.stored_names(run / "model/weights"),
        "stored_dtype": lambda: checkpoint.stored_dtype(run / "model/weights"),
    }


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_distributed(open_all, 1, folder=str(tmp_path_factory.mktemp("hostile")))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CRAFTS)
def test_what_a_folder_brings_is_not_run(opened: dict[str, str], kind: str, way: str) -> None:
    said = opened[f"{kind} / {way}"]
    if way in BARE_INDEX and kind != "index":
        assert said == "read"
    else:
        assert said.startswith("CheckpointError: ") and "\n" not in said
        assert "may run code" in said or kind == "tensor as object"  # which megatron-core refuses before it is read


def test_an_fp8_state_of_numbers_and_tensors_is_read() -> None:
    """As Transformer Engine stores one: a pickled dictionary in a tensor of bytes."""
    from nemo_steerlm.megatron.reading import _check_plain

    state = OrderedDict(scale_fwd=torch.ones(3), amax_history_fwd=torch.zeros(2, 3), extra_fp8_variables={"steps": 4})
    stored = io.BytesIO()
    torch.save([torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)], stored)
    stored.seek(0)
    _check_plain("decoder.layers.mlp.linear_fc1._extra_state/shard_0_2", stored)
    assert stored.tell() == 0

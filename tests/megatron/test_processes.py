"""How a process starts: its device, what it refuses, how long it waits for others, what megatron-core may see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_steerlm import environment
from nemo_steerlm.config import ComputeConfig, GenerateConfig, ParallelConfig
from nemo_steerlm.errors import ConfigError
from nemo_steerlm.megatron import parallel
from nemo_steerlm.train.strategy import DistributedCheckpointIO, MegatronStrategy
from tests.distributed import ROOT, run_distributed

JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process that belongs to no job yet, nor after the test."""
    parallel.shutdown()
    for name in JOB:
        monkeypatch.setenv(name, "")  # so that it is put back whatever the test sets
        monkeypatch.delenv(name)
    yield monkeypatch
    parallel.shutdown()


def _pretend_gpus(monkeypatch: pytest.MonkeyPatch, visible: int, **environment: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [(8, 0, 0), (8, 5, 5), (1, 0, 0), (1, 5, 0), (2, 5, 1)],  # all GPUs, or those of this task alone
)
def test_a_process_takes_its_own_gpu_of_those_it_sees(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    _pretend_gpus(monkeypatch, visible, LOCAL_RANK=local_rank)
    assert parallel.device() == torch.device("cuda", index)


@pytest.mark.parametrize("visible", [1, 8])
def test_lightning_takes_the_same_device_and_counts_the_jobs_processes(
    alone: pytest.MonkeyPatch, visible: int
) -> None:
    job = dict(RANK=13, LOCAL_RANK=5, WORLD_SIZE=16, LOCAL_WORLD_SIZE=8, GROUP_RANK=1)
    _pretend_gpus(alone, visible, **job)
    trainer = lightning.Trainer(num_nodes=2, strategy=MegatronStrategy(DistributedCheckpointIO()), logger=False)
    assert trainer.strategy.root_device == parallel.device() == torch.device("cuda", 5 % visible)
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size) == (8, 2, 16)
    assert (trainer.global_rank, trainer.local_rank, trainer.node_rank) == (13, 5, 1)


def start_together() -> dict:
    """What two ranks hear that see one GPU each, two of a node or the same one; how long one waits for the other."""
    compute = ComputeConfig(devices=2, timeout_minutes=0.03)
    parallel.start(GenerateConfig(checkpoint="unused", prompt="unused", trainer=compute))
    heard = [_look_for_shared_gpus(*gpus) for gpus in (("GPU-a", "GPU-b"), ("GPU-a", "GPU-a"))]
    everyone: list = [None, None]
    dist.all_gather_object(everyone, heard)
    parallel.initialize(ParallelConfig(tensor=2))  # groups made after those the timeout was given to
    began = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(6)
        return {}
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())
    return {"heard": everyone, "waited": time.monotonic() - began}


def _look_for_shared_gpus(*gpus: str) -> str:
    uuid = gpus[dist.get_rank()]
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=uuid)  # type: ignore[assignment, misc]
    try:
        parallel._refuse_shared_gpus()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def together() -> dict:
    return run_distributed(start_together, 2)


def test_two_processes_on_one_gpu_are_refused_by_both(together: dict) -> None:
    message = (
        "ranks 0, 1 would share one GPU (GPU-a); start one process for each GPU of a node: this one sees 1 "
        "(trainer.devices=1), or use trainer.accelerator=cpu"
    )
    assert together["heard"] == [["", message]] * 2


def test_a_process_waits_for_the_others_as_long_as_it_is_told(together: dict) -> None:
    assert 1 < together["waited"] < 5


def test_a_device_that_cannot_start_is_named_with_its_rank(alone: pytest.MonkeyPatch) -> None:
    def busy(_: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be")

    _pretend_gpus(alone, 4, RANK=6, LOCAL_RANK=2, WORLD_SIZE=8)
    alone.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(ConfigError, match=r"^rank 6 of 8 cannot start on cuda:2 of \S+: CUDA error: all .* busy"):
        parallel.initialize()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(GLOO_SOCKET_IFNAME="nowhere0"), "rank 0 of 1 cannot start on cpu of .*nowhere0"),
        (dict(RANK="1", WORLD_SIZE="2"), "rank 1 of 2 cannot start on cpu of .*MASTER_ADDR"),
        (
            dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="no.such.host.invalid", MASTER_PORT="29999"),
            r"rank 1 of 2 cannot start on cpu of .*MASTER_ADDR=no\.such\.host\.invalid, .* cannot be resolved",
        ),
    ],
)
def test_a_backend_that_cannot_start_is_named_with_its_rank(
    alone: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    alone.setattr(parallel, "_timeout", parallel._timeout)
    for name, value in settings.items():
        alone.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        parallel.initialize(timeout=timedelta(seconds=2))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what stands in the environment

WATCH = """
import json, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps(dict(os.environ)))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Watch())
"""
WANTED = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def _python(code: str, **settings: str) -> str:
    names = {*JOB, *WANTED, "PYTORCH_CUDA_ALLOC_CONF"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join([str(ROOT), *filter(None, [settings.pop("PYTHONPATH", "")])])
    command = [sys.executable, "-c", code]
    variables = {**inherited, "PYTHONPATH": path, **settings}
    with tempfile.TemporaryDirectory() as folder:  # an export that ends in the middle leaves its lock there
        run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.mark.parametrize(
    "use",
    [
        "from nemo_steerlm import cli; cli.main(['export', 'checkpoint=nowhere', 'output=nowhere'])",
        "from nemo_steerlm import AttributeConditionedGPT",
        "import nemo_steerlm.megatron.parallel",
    ],
)
def test_torch_is_imported_into_an_environment_for_gpus(use: str) -> None:
    seen = json.loads(_python(WATCH + use))
    assert {name: seen.get(name) for name in WANTED} == WANTED


def test_a_value_of_the_users_own_is_kept() -> None:
    for own in (
        {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_ALLOC_CONF": ""},
        {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
    ):
        kept = dict(own)
        environment.set_defaults(kept)
        assert kept == own


def test_without_cuda_what_is_made_for_it_stays_out_of_megatron_core(tmp_path: Path) -> None:
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} asks for CUDA')\n")
    code = """
from nemo_steerlm import AttributeConditionedGPT
from megatron.core import optimizer, utils
from megatron.core.extensions import transformer_engine
print(optimizer.Adam.__module__.split(".")[0], transformer_engine.HAVE_TE)
"""
    assert _python(code, PYTHONPATH=str(tmp_path)).split() == ["torch", "False"]


def start_at_commits() -> str:
    rank = os.environ["RANK"]
    with tempfile.TemporaryDirectory() as cache:
        checkpoint = f"{cache}/models--org--name/snapshots/{rank * 40}"
        try:
            parallel.start(GenerateConfig(checkpoint=checkpoint, prompt="x"))
        except ConfigError as error:
            return str(error)
    return ""


def test_a_model_that_changed_on_the_hub_while_the_processes_started_is_refused() -> None:
    said = run_distributed(start_at_commits, 2)
    assert said.startswith("the processes read org/name at different commits: ")
    assert said.endswith(f"start again, or give org/name@{'1' * 40}")

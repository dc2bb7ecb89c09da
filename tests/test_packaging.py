from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nemo_steerlm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it is in the extra 'test'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_the_package_with_its_conf_and_nothing_else(wheel):
    assert wheel.name == f"nemo_steerlm-{nemo_steerlm.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"nemo_steerlm/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")}
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "nemo_steerlm").rglob("*.py")}
    assert conf and conf | code <= names
    assert {name.partition("/")[0] for name in names} == {
        "nemo_steerlm",
        f"nemo_steerlm-{nemo_steerlm.__version__}.dist-info",
    }


def test_the_installed_wheel_reads_its_own_conf(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from nemo_steerlm import cli, compose; print(compose.conf_folder()); cli.main(['train-sft', '--help'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "nemo_steerlm" / "conf")
    assert "optimizer.lr=required" in done.stdout


def test_tested_versions_lie_within_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pinned.setdefault(pin.name.lower().replace("_", "-"), []).append(pin)
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(Requirement, wanted):
        assert any(bound.operator in ("<", "<=") for bound in requirement.specifier), (
            f"{requirement} has no upper bound"
        )
        pins = pinned[requirement.name.lower().replace("_", "-")]
        for pin in pins:
            (version,) = [exact.version for exact in pin.specifier]
            assert requirement.specifier.contains(version), f"{pin} against {requirement}"
    for python in ("3.10.0", "3.11.0", "3.12.0"):
        markers = [pin for pin in pinned["megatron-core"] if pin.marker.evaluate({"python_full_version": python})]
        assert [str(pin.specifier) for pin in markers] == ["==0.19.2" if python == "3.12.0" else "==0.16.1"]


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == nemo_steerlm.__version__

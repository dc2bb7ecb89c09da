from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nemo_steerlm
from nemo_steerlm.fake_gpu import guard

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
    code = {
        str(file.relative_to(ROOT)) for kind in ("py", "cpp") for file in (ROOT / "nemo_steerlm").rglob(f"*.{kind}")
    }
    templates = {str(file.relative_to(ROOT)) for file in (ROOT / "nemo_steerlm/report/templates").iterdir()}
    assert "nemo_steerlm/fake_gpu/guard.cpp" in code
    assert conf and len(templates) > 5 and conf | code | templates <= names
    assert {name.partition("/")[0] for name in names} == {
        "nemo_steerlm",
        f"nemo_steerlm-{nemo_steerlm.__version__}.dist-info",
    }


def test_the_installed_wheel_reads_its_own_conf(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from nemo_steerlm import cli; from nemo_steerlm.config import primary; print(primary.conf_folder()); "
    code += "cli.main(['train-sft', '--help'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "nemo_steerlm" / "conf")
    assert "data.train=required" in done.stdout


def test_the_installed_wheel_has_the_fake_gpu(wheel, tmp_path):
    if (reason := guard.missing()) is not None:
        pytest.skip(reason)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from nemo_steerlm.fake_gpu import room; job = room.Room(); print(room.__file__, job.run('builtins:repr'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and "FakeGpu" in done.stdout


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
        asked = {"python_full_version": python}
        markers = [pin for pin in pinned["megatron-core"] if pin.marker and pin.marker.evaluate(asked)]
        assert [str(pin.specifier) for pin in markers] == ["==0.19.2" if python == "3.12.0" else "==0.16.1"]


def test_bounds_end_at_the_newest_versions_tried():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tried = {canonicalize_name(name): Version(v) for name, v in content["tool"]["nemo_steerlm"]["tried"].items()}
    wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, content["project"]["dependencies"])}
    assert tried.keys() == wanted.keys()
    for name, version in tried.items():
        by_minor = version.major == 0 or name in ("torch", "transformers")  # what changes in their minor releases
        next_ = f"{version.major}.{version.minor + 1}" if by_minor else f"{version.major + 1}"
        assert version in wanted[name] and next_ not in wanted[name], f"{name}{wanted[name]}, tried {version}"


def test_nobody_is_given_a_pre_release_of_torch_and_nvidias_fits():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = (r.specifier for r in map(Requirement, dependencies) if r.name == "torch")
    for nvidias in ("2.11.0a0+eb65b36914.nv26.02", "2.12.0a0+0291f960b6"):
        assert nvidias in bound
    offered = ["2.10.0", "2.13.0.dev20260601", "2.14.0rc3", "2.14.1", "2.15.0.dev20261101", "2.15.0a0", "2.15.0rc1"]
    assert max(map(Version, bound.filter(offered))) == Version("2.14.1")
    (upper,) = (str(one) for one in bound if one.operator == "<")  # a newer one would be replaced, by CUDA's
    readme = (ROOT / "README.md").read_text()
    assert f'pip install "torch{upper}" --index-url https://download.pytorch.org/whl/cpu' in readme


def test_what_an_image_lacks_is_in_its_requirements():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {canonicalize_name(Requirement(one).name) for one in dependencies}

    def names(path: Path) -> set[str]:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        return {canonicalize_name(Requirement(line).name) for line in lines if line}

    light = names(ROOT / "docker" / "requirements-ngc.txt")
    for image in sorted((ROOT / "docker").glob("nemo-*.txt")):
        assert wanted <= names(image) | light, image.name
        assert {"torch", "transformer-engine", "apex", "megatron-core"} <= names(image) - light


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == nemo_steerlm.__version__

"""What is said of the libraries that are installed, before one of them is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_steerlm import installed
from nemo_steerlm.errors import ConfigError

OWN = [
    "torch<2.15,>=2.11.0a0", "megatron-core<0.20,>=0.16.1", "lightning<=2.4.0,>=2.4", "psutil<8,>=5.9",
    "nemo_toolkit[core]<3.1,>=3.0", 'pytest; extra == "test"',
]  # fmt: skip
FITTING = {
    "nemo_steerlm": ("0.1.0", OWN), "torch": ("2.12.0a0+0291f960b6", ["cuda-toolkit"]), "psutil": ("7.2.2", []),
    "megatron_core": ("0.18.0", ["torch>=2.6.0", "numpy"]), "lightning": ("2.4.0", ["torch<4.0,>=2.1.0"]),
    "nemo_toolkit": ("3.0.0", ['lightning<=2.4.0; extra == "core"', 'sox; extra == "asr"']), "numpy": ("1.26.4", []),
}  # fmt: skip


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Make this process see the fitting packages, with some changes, as installed and no others."""

    def install(**changes: tuple[str, list[str]] | None) -> None:
        for name, found in {**FITTING, **changes}.items():
            if found is not None:
                folder = tmp_path / f"{name}-{found[0]}.dist-info"
                folder.mkdir()
                asked = "".join(f"Requires-Dist: {one}\n" for one in found[1])
                (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found[0]}\n{asked}")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        installed._version.cache_clear()

    yield install
    installed._version.cache_clear()


def test_nothing_is_said_of_what_fits(install: Callable, caplog: pytest.LogCaptureFixture) -> None:
    install()
    installed.check()
    assert not caplog.records


def test_a_checkout_that_is_not_installed_is_left_alone(install: Callable, caplog: pytest.LogCaptureFixture) -> None:
    install(nemo_steerlm=None, torch=("1.0", []), psutil=None)
    installed.check()
    assert not caplog.records


def test_one_line_names_all_that_was_not_tried_together(install: Callable, caplog: pytest.LogCaptureFixture) -> None:
    install(
        torch=("2.10.0a0+b558c98", []),
        lightning=("2.6.1", ["torch>=2.1.0"]),
        megatron_core=("0.20.0", ["torch>=2.12", "absent>=1"]),
    )
    installed.check()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.getMessage()
    for words in (
        "torch 2.10.0a0+b558c98 (nemo_steerlm asks for torch<2.15,>=2.11.0a0)",
        "torch 2.10.0a0+b558c98 (megatron-core asks for torch>=2.12)",
        "lightning 2.6.1 (nemo_steerlm asks for lightning<=2.4.0,>=2.4)",
        "lightning 2.6.1 (nemo-toolkit asks for lightning<=2.4.0",
        "megatron-core 0.20.0 (nemo_steerlm asks for",
        "absent is missing (megatron-core asks for absent>=1)",
    ):
        assert words in record.getMessage()


def test_a_package_that_is_not_there_is_an_error_that_says_how_to_get_it(install: Callable) -> None:
    install(psutil=None, lightning=None)
    with pytest.raises(
        ConfigError, match=r"not installed: lightning<=2.4.0,>=2.4, psutil<8,>=5.9; run: python -m pip"
    ):
        installed.check()


def test_the_engine_asks_before_it_loads_torch(tmp_path: Path) -> None:
    """A verb that needs the engine ends with one line where a package is missing; the help needs no package."""
    folder = tmp_path / "nemo_steerlm-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nemo_steerlm\nVersion: 0.1.0\nRequires-Dist: gone>=1\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from nemo_steerlm import cli\n"
        "assert cli.main(['--help']) == 0\n"
        "code = cli.main(['generate', 'checkpoint=here', 'prompt=Hello'])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("steerlm: error: not installed: gone>=1; run: python -m pip install 'gone>=1'")

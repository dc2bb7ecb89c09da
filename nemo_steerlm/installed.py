"""Checks the versions of installed libraries before they are imported.

In NVIDIA's containers many packages are not installed by pip. Unsuitable versions are reported here, not by a
traceback in the middle of a training.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_steerlm.errors import ConfigError

_log = logging.getLogger(__name__)
_OWN = "nemo_steerlm"
_ENGINE = ("torch", "megatron-core", "lightning", "nemo-toolkit", "transformers")  # must fit each other


def check() -> None:
    """Compare the installed versions with our requirements, and the engine's libraries with each other.

    Untried versions may work: one logged line names them all. A checkout that is on the path without being installed
    is not checked.

    Raises:
        ConfigError: required packages are missing.
    """
    if _version(_OWN) is None:
        return
    own = list(_requirements(_OWN))
    absent = [str(requirement) for requirement in own if _version(requirement.name) is None]
    if absent:
        raise ConfigError(
            f"not installed: {', '.join(absent)}; run: python -m pip install {' '.join(map(repr, absent))} (in one of "
            "NVIDIA's containers: python -m pip install --no-deps -r docker/requirements-ngc.txt)"
        )
    extras: dict[str, set[str]] = {canonicalize_name(requirement.name): requirement.extras for requirement in own}
    wrong = [
        f"{requirement.name} {_version(requirement.name) or 'is missing'} ({name} asks for {requirement})"
        for name in (_OWN, *_ENGINE)
        for requirement in _requirements(name, extras.get(name, set()))
        if not _fits(name, requirement)
    ]
    if wrong:
        _log.warning("versions that were not tried together: %s", "; ".join(wrong))


def _fits(name: str, requirement: Requirement) -> bool:
    """Whether the requirement of package `name` is met; missing requirements of torch are ignored.

    NVIDIA's builds of torch have no reliable metadata about CUDA's libraries.
    """
    version = _version(requirement.name)
    if version is None:
        return name == "torch"
    if canonicalize_name(requirement.name) not in _ENGINE:
        return True
    return requirement.specifier.contains(version, prereleases=True)  # NVIDIA's torch is a pre-release


def _requirements(name: str, extras: set[str] = frozenset()) -> Iterator[Requirement]:  # type: ignore[assignment]
    """The requirements of an installed package in this environment; none if it is missing."""
    try:
        found = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    here = [text for text in found if "extra ==" not in text or any(extra in text for extra in extras)]  # of hundreds
    for requirement in map(Requirement, here):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            yield requirement


@functools.cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Patches of a library's private parts, with fallback to the library's own code.

A library may change its private parts in any release. A patch passes unknown arguments on; where that is not enough,
or the part is gone, the library's own code runs and the loss is logged. Each patch names the place in the library, the
versions it was tried with, and when to remove it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

_log = logging.getLogger(__name__)
_DISTRIBUTIONS = {"megatron": "megatron-core"}  # where a module's name is not the package's
_left: set[str] = set()  # parts already logged


def leave(part: str, why: object, effect: str) -> None:
    """Log, once a process, that `part` of a library stays as it is.

    Args:
        part: its dotted name.
        why: what did not fit; of an exception, the first line.
        effect: what the user loses.
    """
    if part in _left:
        return
    _left.add(part)
    library = release(part.partition(".")[0])
    _log.warning("%s: %s is left as it is (%s): %s", library, part, str(why).partition("\n")[0], effect)


def release(module: str) -> str:
    """The distribution of a top-level `module` and its version: "megatron-core 0.16.1".

    `megatron.core.__version__` is not used: 0.19 adds the commit of the git checkout that it is run in.
    """
    library = _DISTRIBUTIONS.get(module, module)
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return library


def replace(owner: Any, effect: str, needs: tuple[str, ...] = (), /, **functions: Callable | Any) -> bool:
    """Replace `owner`'s attributes of these names by `functions`: all or none.

    Args:
        owner: the module, class or object to patch.
        effect: what the user loses where one of the names is gone.
        needs: names that the functions use.
        functions: the new ones.

    Returns:
        Whether they are in place.
    """
    gone = [name for name in (*functions, *needs) if not hasattr(owner, name)]
    if gone:
        kind = owner if isinstance(owner, (type, ModuleType)) else type(owner)
        part = kind.__name__ if isinstance(kind, ModuleType) else f"{kind.__module__}.{kind.__qualname__}"
        leave(part, f"it has no {', '.join(gone)}", effect)
        return False
    for name, function in functions.items():
        setattr(owner, name, function)
    return True

"""Load the parts of libraries that only training uses at their first use, not with the library.

On import, megatron-core and Lightning load torch's compiler, wandb, TensorBoard, matplotlib and some hundred metrics
of torchmetrics. That takes longer than everything inference needs. Inside `deferring`, importing such a part gives a
module that has not been executed. It provides the names in `_PARTS`, which the libraries need while they load, and is
executed at the first access to any other name.

Python's `importlib.util.LazyLoader` executes a module at the first access to any attribute, and torch reads
`__file__` of all modules (`inspect.getmodule`).

Tried with torch 2.13.0 and 2.14.1, megatron-core 0.16.1 and 0.19.2, lightning 2.4.0, torchmetrics 1.9.0. A part
that does not fit is executed at once, as without this module. Remove an entry once its library loads the part lazily.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any, Union

from nemo_steerlm.megatron import patches

# A module, and the names it provides before it is executed: from another module, or (None) as a stand-in.
_PARTS: dict[str, dict[str, str | None]] = {
    "wandb": {},  # megatron/core/timers.py, inference/: whether it is there
    "onnx": {},  # nemo/utils/export_utils.py
    "torch.utils.tensorboard": {"SummaryWriter": None},  # megatron/core/timers.py: isinstance
    "torch._dynamo": {"OptimizedModule": None},  # lightning/fabric/wrappers.py: isinstance
    "torchmetrics": {  # lightning: subclasses of Metric, isinstance
        "Metric": "torchmetrics.utilities.checks",  # which imports torchmetrics.metric, in the order that works
        "MetricCollection": "torchmetrics.collections",
        "__version__": "torchmetrics.__about__",
        "_logger": None,
    },
    # torchmetrics/metric.py: annotations, a function that Metric.plot calls
    "torchmetrics.utilities.plot": {"_AX_TYPE": None, "_PLOT_OUT_TYPE": None, "plot_single_or_multi_val": None},
}


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Load libraries without the parts that only training uses, torch first.

    Imported modules are never freed: the garbage collector, which would visit them again and again, waits.
    """
    with contextlib.ExitStack() as afterwards:
        if gc.isenabled():
            gc.disable()
            afterwards.callback(gc.enable)
        import torch

        for owner, name, inline in ((torch, "compile", True), (torch.compiler, "disable", False)):
            late = _late(getattr(owner, name), inline)
            setattr(owner, name, late)
            afterwards.callback(_restore, owner, name, late)
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        afterwards.callback(finder.leave)
        yield


def _restore(owner: Any, name: str, late: Any) -> None:
    if getattr(owner, name) is late:
        setattr(owner, name, late.__wrapped__)


def _late(decorate: Any, inline: bool) -> Any:
    """A decorator of torch's compiler that loads the compiler at the first call of a decorated function.

    Args:
        inline: whether a compiled caller may inline the function.
    """

    @functools.wraps(decorate)
    def late(*args: Any, **settings: Any) -> Any:
        if not args and not {"model", "fn"} & settings.keys():
            return functools.partial(late, **settings)
        function = args[0] if args else None
        if not isinstance(function, types.FunctionType):
            return decorate(*args, **settings)
        decorated: Any = None

        @functools.wraps(function)
        def call(*inputs: Any, **named: Any) -> Any:
            nonlocal decorated
            if decorated is None:
                decorated = decorate(*args, **settings)
            return decorated(*inputs, **named)

        if inline:
            call._torchdynamo_inline = function  # type: ignore[attr-defined]  # as torch.compile marks its own
        return call

    return late


class _Finder:
    """Finds the modules of `_PARTS` before Python does, and does not execute them."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Of the finder protocol; a `target` is a reload, which executes the module."""
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _Deferred) and not parent.busy:
            parent.real()  # before its submodules
        spec = PathFinder.find_spec(name, path) if name in _PARTS and target is None else None
        if spec is not None:
            spec.loader = self  # type: ignore[assignment]
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Of the loader protocol: Python creates the module."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Do not execute it."""
        module.__class__ = _Deferred
        self.made.append(module)

    def leave(self) -> None:
        """Find nothing any more."""
        sys.meta_path.remove(self)
        for module in self.made:
            if type(module) is _Deferred:
                module.leave()


class _Deferred(types.ModuleType):
    """A module that has not been executed."""

    busy = False  # whether a submodule is being imported for a name of `_PARTS`

    def __getattr__(self, name: str) -> Any:
        source = _PARTS[self.__name__].get(name, "")
        if source is None:
            return _Name(self.__name__, name)
        locations = self.__spec__.submodule_search_locations  # type: ignore[union-attr]  # None of what is no package
        if self.busy or (name == "__path__" and locations is None):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        early = source and "__path__" in vars(self)  # not after `leave`
        return self._early(name, source) if early else getattr(self.real(), name)

    def _early(self, name: str, source: str) -> Any:
        """A name from a submodule, or from the module itself where the submodule lacks it."""
        self.busy = True
        try:
            return getattr(importlib.import_module(source), name)
        except (ImportError, AttributeError) as error:
            patches.leave(self.__name__, error, "it is loaded whole, which takes seconds")
        finally:
            del self.busy
        return getattr(self.real(), name)

    def real(self) -> types.ModuleType:
        """The executed module."""
        if sys.modules.get(self.__name__) is not self:
            return importlib.import_module(self.__name__)
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        try:
            return importlib.reload(self)  # in place
        except BaseException:
            self.__class__ = _Deferred
            raise

    def leave(self) -> None:
        """Leave `sys.modules`; where names of it are in use, be executed at the next access instead."""
        if any(_PARTS[self.__name__].values()):
            del self.__path__
            return
        sys.modules.pop(self.__name__, None)
        parent, _, child = self.__name__.rpartition(".")
        if parent and vars(sys.modules[parent]).get(child) is self:
            delattr(sys.modules[parent], child)

    def __eq__(self, other: object) -> bool:
        return other is self or other is sys.modules.get(self.__name__)

    __hash__ = types.ModuleType.__hash__


class _Name:
    """Stands for a class or function of a module that is not executed yet; such a class has no instances."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        module = importlib.import_module(self._module)
        return getattr(module.real() if isinstance(module, _Deferred) else module, self._name)

    def __instancecheck__(self, instance: object) -> bool:
        module = sys.modules.get(self._module)
        return module is not None and type(module) is not _Deferred and isinstance(instance, self._real())

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self._real(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # read from everything in an annotation
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007

    __ror__ = __or__

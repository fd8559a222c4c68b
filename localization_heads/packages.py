"""Torch, transformers and accelerate: their versions are checked before they are imported, and not all of them is.

With another version, an import fails somewhere inside, with a name that says nothing to whom it happens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from localization_heads.errors import WorkError


class Range(NamedTuple):
    """The versions from `first` on, and below `end` if there is one."""

    first: str
    end: str | None = None

    @property
    def requirement(self) -> str:
        """As pip takes it, after the name of the package."""
        return f">={self.first}" + (f",<{self.end}" if self.end else "")

    def holds(self, version: str) -> bool:
        """Whether a version lies within. One that cannot be read is taken to.

        >>> Range("5.23", "6").holds("5.23.0.dev0"), Range("5.23", "6").holds("4.57.1")
        (True, False)
        """
        number = _numbers(version)
        below = self.end is None or number < _numbers(self.end)
        return not number or (_numbers(self.first) <= number and below)


NEEDED = {"torch": Range("2.6"), "transformers": Range("5.23", "6"), "accelerate": Range("1.2.1")}
"""What pyproject.toml says of them."""


TRIMMED = {"torch": Range("2.6", "2.16"), "transformers": Range("5.23", "5.25")}
"""The versions whose imports are known, and tested, to do without what `transformers_alone` leaves out."""


DEMO = Range("6.17")
"""Of gradio, which is an extra."""


@cache
def check_versions() -> None:
    """Raises WorkError, which names the version that is here and the one that is needed."""
    for name, needed in NEEDED.items():
        check_version(name, needed)


def check_version(name: str, needed: Range) -> None:
    """Raises WorkError where a package is missing or its version is another."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise WorkError(f"{name} is missing: pip install '{name}{needed.requirement}'") from None
    if not needed.holds(found):
        end = f" and older than {needed.end}" if needed.end else ""
        raise WorkError(
            f"{name} {found} is installed, and this needs {needed.first} or newer{end}: "
            f"pip install '{name}{needed.requirement}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, three at least.

    >>> _numbers("2.13.0+cpu"), _numbers("5.23"), _numbers("main")
    ((2, 13, 0), (5, 23, 0), ())
    """
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version)
    numbers = tuple(int(part) for part in found[0].split(".")) if found else ()
    return numbers + (0,) * (3 - len(numbers)) if numbers else ()


class _Deferred(ModuleType):
    """`torch._dynamo`, torch's compiler, which is imported when something is first asked of it.

    Marking a function for it is nothing that needs it at once: marks are made when it is imported, and until then
    nothing is compiled that a function could be kept out of.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__package__, self.__file__ = spec, spec.name, spec.origin
        self._marked: list[tuple[str, Any]] = []
        self._kept = {
            "allow_in_graph": partial(self._mark, "allow_in_graph"),
            "assume_constant_result": partial(self._mark, "assume_constant_result"),
            "disable": self._disable,
        }

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if spec is None or spec.loader is None or (name.startswith("__") and name != "__path__"):
            raise AttributeError(name)
        if name in self._kept:
            return self._kept[name]
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__path__ = spec.submodule_search_locations or []
        spec.loader.exec_module(self)
        for mark, function in self._marked:
            getattr(self, mark)(function)
        return getattr(self, name)

    def _mark(self, name: str, function: Any) -> Any:
        self._marked.append((name, function))
        return function

    def _disable(self, function: Any = None, recursive: bool = True, **how: Any) -> Any:
        if function is None:
            return partial(self._disable, recursive=recursive, **how)

        @wraps(function)
        def called(*args: Any, **kw: Any) -> Any:
            if type(self) is _Deferred:
                return function(*args, **kw)
            return self.disable(function, recursive, **how)(*args, **kw)

        return called

    @contextmanager
    def lending_parts(self) -> Iterator[None]:
        """In the block its submodules can be imported without it; of these, transformers needs one."""
        self.__path__ = (self.__spec__ and self.__spec__.submodule_search_locations) or []
        yield
        if type(self) is _Deferred:
            del self.__path__


@contextmanager
def _replaced(owner: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def transformers_alone() -> Iterator[None]:
    """While transformers is imported in the block, what it imports for training and for compiling stays out.

    That is torch's compiler, for which it marks some functions, tensors spread over processes, and the assignment
    solver of losses. The compiler is imported where it is used after all; for the other two, transformers takes this
    process for one that does not have them. Versions that are not among `TRIMMED` are imported whole.
    """
    if not all(versions.holds(metadata.version(name)) for name, versions in TRIMMED.items()):
        yield
        return
    import torch.distributed

    spec = find_spec("torch._dynamo")
    with ExitStack() as stack:
        if "torch._dynamo" not in sys.modules and spec is not None:
            sys.modules[spec.name] = torch._dynamo = compiler = _Deferred(spec)
            stack.enter_context(compiler.lending_parts())
        stack.enter_context(_replaced(torch.distributed, "is_available", lambda: False))
        import transformers.utils

        stack.enter_context(_replaced(transformers.utils, "is_scipy_available", lambda: False))
        yield

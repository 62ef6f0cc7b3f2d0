"""Old names of the public API: they work for one more version, with a DeprecationWarning."""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def renamed_attribute(old: str, new: str) -> property:
    """Return a property that reads the attribute ``new`` under the name ``old``."""

    def read(instance: Any) -> Any:
        warn_renamed(f"{type(instance).__name__}.{old}", new)
        return getattr(instance, new)

    return property(read, doc=f"Deprecated: the old name of ``{new}``.")


def renamed_argument(old: str, new: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that passes the keyword argument ``old`` on as ``new``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}: {old} is the old name of {new}; give one of them")
                warn_renamed(f"{function.__qualname__}({old}=...)", f"{new}=...")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def moved_names(module: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module whose names are in other modules now, {name: module}."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{modules[name]}.{name}")
        return getattr(importlib.import_module(modules[name]), name)

    return get


def warn_renamed(old: str, new: str, level: int = 3) -> None:
    """Warn that ``old`` will be removed; ``level`` is the distance to the line of the user."""
    message = f"{old} is deprecated and will be removed in the next version; use {new}"
    warnings.warn(message, DeprecationWarning, level)

"""Old names of the public API: they work for one more version, with a DeprecationWarning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any


def renamed_attribute(old: str, new: str) -> property:
    """Return a property that reads the attribute ``new`` under the name ``old``."""

    def read(instance: Any) -> Any:
        _warn(f"{type(instance).__name__}.{old}", new)
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
                _warn(f"{function.__qualname__}({old}=...)", f"{new}=...")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is deprecated and will be removed in the next version; use {new}", DeprecationWarning, 3)

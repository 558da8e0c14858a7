"""Names in configs become parts: a table's entry or a user's own object, called with the settings that it knows."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def nearest(name: str, names: Any) -> str:
    """The end of an error message about an unknown name: the nearest known one, and all."""
    found = difflib.get_close_matches(name, list(names), 1)
    return (f" Did you mean {found[0]!r}?" if found else "") + f" Known: {', '.join(sorted(names))}."


def call(factory: Callable[..., Any], kwargs: Mapping[str, Any], where: str, **given: Any) -> Any:
    """factory(**given it asks for, **kwargs); an unknown keyword is an error that names the nearest."""
    known = inspect.signature(factory).parameters
    given = {k: v for k, v in given.items() if k in known}
    for key in kwargs:
        if key not in known or key in given:
            raise ValueError(f"{where} has no field {key!r}." + nearest(key, known.keys() - given.keys()))
    return factory(**given, **kwargs)


def named(name: str, table: Mapping[str, Any], where: str) -> Any:
    """table[name], or the object that "module:name" names: a user's own part."""
    if name in table:
        return table[name]
    if ":" not in name:
        raise ValueError(f"{where} {name!r} is not known." + nearest(name, table) + " Your own: 'module:name'.")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} {name!r}: {error}. Is the module's folder on PYTHONPATH?") from error

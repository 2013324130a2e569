"""Settings composed of parts: frozen dataclasses whose leaves become flags and keys of ``config.json``.

A leaf is a field declared as ``size: Annotated[int, "its help"] = 1``, where ``Annotated`` may go on with a tuple of
the values that are allowed and with a name other than the field's. A part is a field whose type is a dataclass. The
names of the leaves are the flags of the examples and the keys, all on one level, under which a run's settings are
stored. Other fields (a seed derived from the run's) are not stored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

S = TypeVar("S")
REQUIRED: Any = MISSING


@dataclass(frozen=True)
class Leaf:
    """One setting. ``default`` is REQUIRED where there is none; without ``choices`` any value is allowed."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


def leaves(kind: type) -> dict[str, Leaf]:
    """All leaves of a settings class, its parts' included, by name."""
    return {leaf.name: leaf for leaf in _leaves(kind, REQUIRED)}


def flatten(settings: Any) -> dict[str, Any]:
    """The values of all leaves, by name."""
    values: dict[str, Any] = {}
    for field, hint, default in _fields(type(settings), settings):
        if get_origin(hint) is Annotated:
            values[_leaf(field, hint, default).name] = default
        elif _is_part(hint):
            values |= flatten(default)
    return values


def compose(kind: type[S], values: Mapping[str, Any]) -> S:
    """Settings with these values of leaves; the others have their defaults, and unknown names are ignored.

    Lists become tuples. Raises ValueError where a value is out of range, or one without a default is missing.
    """
    return _compose(kind, values, REQUIRED)


def change(settings: S, **values: Any) -> S:
    """The same settings with other values of some leaves, by name. Raises ValueError for an unknown name."""
    unknown = sorted(set(values) - set(flatten(settings)))
    if unknown:
        raise ValueError(f"{type(settings).__name__} has no setting {', '.join(unknown)}")
    return _compose(type(settings), values, settings)


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError for a value, as one in a file may be, that is not of a setting's type."""
    if get_origin(kind) is tuple:
        right, wanted = (
            isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value),
            "a list of texts",
        )
    else:
        right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]
    if not right:
        raise ValueError(f"{name} should be {wanted}, not {reprlib.repr(value)}")


def _fields(kind: type, whole: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of each field; the default is the value in ``whole`` where that is not REQUIRED."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        yield field.name, hints[field.name], field.default if whole is REQUIRED else getattr(whole, field.name)


def _is_part(hint: Any) -> bool:
    return is_dataclass(hint)


def _leaf(field: str, hint: Any, default: Any) -> Leaf:
    text, *extras = hint.__metadata__
    name = next((extra for extra in extras if isinstance(extra, str)), field)
    return Leaf(name, default, text, next((extra for extra in extras if isinstance(extra, tuple)), ()))


def _leaves(kind: type, whole: Any) -> Iterator[Leaf]:
    for field, hint, default in _fields(kind, whole):
        if get_origin(hint) is Annotated:
            yield _leaf(field, hint, default)
        elif _is_part(hint):
            yield from _leaves(hint, default)


def _compose(kind: type[S], values: Mapping[str, Any], whole: Any) -> S:
    given: dict[str, Any] = {}
    for field, hint, value in _fields(kind, whole):
        if get_origin(hint) is Annotated:
            name = _leaf(field, hint, value).name
            value = values.get(name, value)
            if value is REQUIRED:
                raise ValueError(f"{name} has no default and must be given")
            _check_type(name, value, hint.__origin__)
            given[field] = tuple(value) if isinstance(value, list) else value
        elif _is_part(hint):
            given[field] = _compose(hint, values, value)
        elif value is not REQUIRED:
            given[field] = value
    return kind(**given)

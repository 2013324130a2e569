"""Settings composed of parts: frozen dataclasses whose leaves have names of their own.

A leaf is a field made by ``option``; a part is a field whose type is a dataclass. The names of the leaves are the flags
of the examples, and the keys under which a run's settings are stored, flat, in its config.json. Fields that are neither
(a seed derived from the run's) are not part of what is stored. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

S = TypeVar("S")
REQUIRED: Any = MISSING


def option(default: Any, text: str, *, name: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A leaf with its help; ``name`` where its flag is not called as the field is, ``choices`` what it may be."""
    metadata = {"help": text, "name": name, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Leaf:
    """A setting of a composition; ``default`` is REQUIRED where there is none."""

    name: str
    default: Any
    help: str
    choices: tuple[str, ...]


def leaves(kind: type) -> dict[str, Leaf]:
    """All leaves of a settings class, its parts' included, by name."""
    return {leaf.name: leaf for leaf in _leaves(kind, REQUIRED)}


def flatten(settings: Any) -> dict[str, Any]:
    """The values of all leaves, by name."""
    values: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        if "help" in each.metadata:
            values[_name(each)] = value
        elif is_dataclass(value):
            values |= flatten(value)
    return values


def compose(kind: type[S], values: Mapping[str, Any]) -> S:
    """Settings with these values of leaves; what is not given has its default, and unknown names are ignored.

    Lists become tuples. Raises ValueError where a value is out of range, or one without a default is missing.
    """
    return _compose(kind, values, REQUIRED)


def change(settings: S, **values: Any) -> S:
    """The same settings with other values of some leaves, by name. Raises ValueError for an unknown name."""
    unknown = sorted(set(values) - set(flatten(settings)))
    if unknown:
        raise ValueError(f"{type(settings).__name__} has no setting {', '.join(unknown)}")
    return _compose(type(settings), values, settings)


def _name(each: Field[Any]) -> str:
    return str(each.metadata["name"] or each.name)


def _default(each: Field[Any], whole: Any) -> Any:
    """What a field is without being given: its value in ``whole``, where there is one, else its own default."""
    return each.default if whole is REQUIRED else getattr(whole, each.name)


def _leaves(kind: type, whole: Any) -> Iterator[Leaf]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        default = _default(each, whole)
        if "help" in each.metadata:
            yield Leaf(_name(each), default, each.metadata["help"], each.metadata["choices"])
        elif is_dataclass(hints[each.name]):
            yield from _leaves(hints[each.name], default)


def _compose(kind: type[S], values: Mapping[str, Any], whole: Any) -> S:
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for each in fields(kind):  # type: ignore[arg-type]
        value = _default(each, whole)
        if "help" in each.metadata:
            value = values.get(_name(each), value)
            if value is REQUIRED:
                raise ValueError(f"{_name(each)} has no default and must be given")
            given[each.name] = tuple(value) if isinstance(value, list) else value
        elif is_dataclass(hints[each.name]):
            given[each.name] = _compose(hints[each.name], values, value)
        elif value is not REQUIRED:
            given[each.name] = value
    return kind(**given)

"""Options of heads and tasks: frozen dataclasses, filled from text (key=value) or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from featstore.errors import invalid, not_found

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
_NONE = ("auto", "none")


def split_options(
    given: Mapping[str, Any], owners: Mapping[str, type[Any]]
) -> dict[str, dict[str, Any]]:
    """Sort options by who knows them, and read those that came as text.

    Args:
        given: Options by name, for example ``{"queries": "56", "crop": "none"}``.
        owners: Options dataclass by owner, for example ``{"head": DeapOptions}``.

    Returns:
        For each owner, the keyword arguments of its dataclass.

    Raises:
        NotFoundError: Nobody knows an option.
        InvalidInputError: A text does not read as the option's type, or two owners know it.
    """
    sorted_options: dict[str, dict[str, Any]] = {owner: {} for owner in owners}
    for name, value in given.items():
        takers = [owner for owner, kind in owners.items() if name in option_types(kind)]
        if not takers:
            known = {field for kind in owners.values() for field in option_types(kind)}
            raise not_found("option", name, known)
        if len(takers) > 1:
            raise invalid("option", name, f"known to one only, not to {' and '.join(takers)}")
        kind = option_types(owners[takers[0]])[name]
        sorted_options[takers[0]][name] = _read(name, value, kind)
    return sorted_options


def parse_options(options_type: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Read options for one dataclass: keyword arguments for it.

    Raises:
        NotFoundError: The dataclass has no such field.
        InvalidInputError: A text does not read as the field's type.
    """
    return split_options(given, {"options": options_type})["options"]


def option_types(options_type: type[Any]) -> dict[str, Any]:
    """Give the type of each field of an options dataclass."""
    hints = get_type_hints(options_type)
    return {field.name: hints[field.name] for field in fields(options_type)}


def option_defaults(options_type: type[Any]) -> dict[str, Any]:
    """Give the default of each field of an options dataclass that has one."""
    return {f.name: f.default for f in fields(options_type) if f.default is not MISSING}


def _read(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or kind is str:
        return value
    kinds = get_args(kind) or (kind,)
    if NoneType in kinds and value.lower() in _NONE:
        return None
    target = next(k for k in kinds if k is not NoneType)
    if target is bool:
        return _read_bool(name, value)
    try:
        return target(value)
    except ValueError:
        allowed = f"{target.__name__}, or auto" if NoneType in kinds else target.__name__
        raise invalid(name, value, f"of type {allowed}") from None


def _read_bool(name: str, value: str) -> bool:
    if value.lower() not in _TRUE + _FALSE:
        raise invalid(name, value, "true or false")
    return value.lower() in _TRUE

"""Kinds of option values that click does not have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from featstore.remote.location import is_url


class StorePath(click.ParamType[Path]):
    """A folder, or a URL, of which the local mirror is given, up to date."""

    name = "DIR|URL"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Give the folder."""
        if not is_url(value):
            return Path(value)
        from featstore.store import locate

        return locate(value)


class Size(click.ParamType[tuple[int, int]]):
    """``N`` or ``HxW``, both positive."""

    name = "N|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Give (height, width)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", value)
        if match is None:
            self.fail(f"{value!r} is no size. Give it as 224 or 240x320 (HxW).", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class Tail(click.ParamType[int | str]):
    """``N``, positive, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Give the number, or "auto"."""
        if value == "auto" or isinstance(value, int):
            return value
        if re.fullmatch(r"[1-9]\d*", value) is None:
            self.fail(f"{value!r} is no number of blocks. Give it as 3, or auto.", param, ctx)
        return int(value)


class Seconds(click.ParamType[float]):
    """``N`` seconds, or with a unit ``90s``, ``15m``, ``1h``, ``2d``."""

    name = "SECONDS|1h"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Give the seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value)
        if match is None:
            self.fail(f"{value!r} is no time. Give it as 3600, 90s, 15m, 1h or 2d.", param, ctx)
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


class Part(click.ParamType[tuple[int, int]]):
    """``I/N``: the I-th of N parts, counted from 1."""

    name = "I/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Give (I, N)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", value)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part. Give it as 1/4, 2/4, ... 4/4.", param, ctx)
        return int(match[1]), int(match[2])


class Counts(click.ParamType[tuple[int, ...]]):
    """``N`` or ``N,N,...``, all positive."""

    name = "N[,N...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Give the numbers."""
        if isinstance(value, tuple):
            return value
        if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", str(value)) is None:
            self.fail(f"{value!r} is no {self.name}, such as 1 or 1,2.", param, ctx)
        return tuple(map(int, str(value).split(",")))


class Names(click.ParamType[tuple[str, ...]]):
    """``NAME`` or ``NAME,NAME,...``, each once."""

    name = "NAME[,NAME...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """Give the names."""
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in value.split(","))
        if "" in names or len(set(names)) < len(names):
            self.fail(f"{value!r} is no {self.name}, such as fox,rabbit.", param, ctx)
        return names


class Words(click.ParamType[tuple[str, ...]]):
    """``WORD,WORD,...``, each once."""

    name = "NAME[,NAME...]"
    separator = re.compile(",")

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """Give the words."""
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in self.separator.split(value))
        if "" in words or len(set(words)) < len(words):
            self.fail(f"{value!r} must be words parted by commas, each once.", param, ctx)
        return words


class Numbers(click.ParamType[tuple[float, ...]]):
    """``NUMBER,NUMBER,...``."""

    name = "NUMBER[,NUMBER...]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Give the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} must be numbers parted by commas.", param, ctx)


class KeyValue(click.ParamType[tuple[str, str]]):
    """``KEY=VALUE``, the value still being text."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        """Give the key and the value."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is no {self.name}, such as split=test.", param, ctx)
        return key, text


class KeyValues(click.ParamType[tuple[str, tuple[str, ...]]]):
    """``KEY=VALUE,VALUE,...``, the values still being text."""

    name = "KEY=VALUE,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[str, ...]]:
        """Give the key and its values."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        values = tuple(text.split(","))
        if not equals or not key.isidentifier() or "" in values or len(set(values)) < len(values):
            self.fail(f"{value!r} is no {self.name}, such as lr=1e-3,3e-4.", param, ctx)
        return key, values

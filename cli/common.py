"""What every command shares: exit codes, the store option, JSON on stdout, messages on stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished with images left out, 130 interrupted. A
traceback means a bug of ours, never a bad input.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from cli.params import StorePath
from featstore.errors import FeatstoreError

FAILED, USAGE, LEFT_OUT, INTERRUPTED = 1, 2, 3, 130
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
MAX_LISTED = 20  # images left out that are named one by one

F = TypeVar("F", bound=Callable[..., Any])


class Interrupted(click.ClickException):
    """Ctrl-C, with the sentence that says how to go on."""

    exit_code = INTERRUPTED

    def show(self, file: Any = None) -> None:
        """Print the sentence to stderr."""
        click.echo(f"\nInterrupted. {self.message}", file=file, err=True)


@contextlib.contextmanager
def resumable(how: str) -> Iterator[None]:
    """Turn Ctrl-C into a message that says how to go on; what the library says goes first."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(str(stop) or how) from None


def exit_code(command: click.Group, args: Sequence[str] | None = None) -> int:
    """Run a command group and give the exit code instead of leaving the process."""
    try:
        # `name` is what completion scripts and usage lines call the program.
        result = command.main(args=args, prog_name=command.name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FeatstoreError as error:
        click.echo(f"Error: {one_line(error)}", err=True)
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def run_and_exit(command: click.Group) -> NoReturn:
    """Run a command group as a program."""
    sys.exit(exit_code(command))


def one_line(error: Exception) -> str:
    """Give an error's message without line breaks."""
    return " ".join(str(error).split())


def leave(code: int) -> NoReturn:
    """End the running command with an exit code."""
    click.get_current_context().exit(code)


def store_option(function: F) -> F:
    """Add ``--store``: the option, else ``$FEATSTORE``, else ``features.zarr`` here."""
    return click.option(
        "--store",
        "store_path",
        type=StorePath(),
        envvar="FEATSTORE",
        default=Path("features.zarr"),
        show_default=True,
        show_envvar=True,
        metavar="DIR|URL",
        help="The store: a folder, or a URL such as s3://bucket/features.zarr.",
    )(function)


def chosen_store(store_path: Path, runs_path: Path | None) -> Path | None:
    """Give the store; None, for "the one the run was trained from", where only runs are named."""
    source = click.get_current_context().get_parameter_source("store_path")
    is_default = source is ParameterSource.DEFAULT
    return None if is_default and runs_path is not None else store_path


def is_said(name: str) -> bool:
    """Tell whether the running command was given a parameter, and does not use its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source not in (
        ParameterSource.DEFAULT,
        ParameterSource.DEFAULT_MAP,
    )


def json_option(function: F) -> F:
    """Add ``--json``."""
    text = "Print one JSON object on stdout instead of text."
    return click.option("--json", "as_json", is_flag=True, help=text)(function)


def runs_option(function: F) -> F:
    """Add ``--runs``: where run folders lie when the store cannot take them."""
    return click.option(
        "--runs",
        "runs_path",
        type=click.Path(path_type=Path, file_okay=False),
        default=None,
        metavar="DIR",
        help="Folder of runs, where it is not the store's own.",
    )(function)


def device_option(function: F) -> F:
    """Add ``--device``."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda|mps",
        help="Where to compute; auto takes a GPU where there is one.",
    )(function)


def say(message: str) -> None:
    """Tell the user something; stdout stays free for data."""
    click.echo(message, err=True)


def say_left_out(reasons: Mapping[str, str]) -> None:
    """Name the first images that were left out, each with its reason."""
    for path, reason in list(reasons.items())[:MAX_LISTED]:
        say(f"Left out {path}: {reason}")


def print_json(value: Any) -> None:
    """Print exactly one JSON object."""
    click.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Turn a result into JSON values; a number that JSON lacks (NaN, infinity) becomes null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    return str(value)

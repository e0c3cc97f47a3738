from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest

from cli.common import exit_code, leave, plain, print_json, resumable
from featstore.errors import InvalidInputError


def group_of(function):
    group = click.Group("tool")
    group.add_command(click.command("do")(function))
    return group


def run(function, *args):
    return exit_code(group_of(function), ["do", *args])


def test_a_command_that_returns_is_done(capsys):
    assert run(lambda: None) == 0


def test_an_error_of_ours_is_one_line_on_stderr_and_exit_1(capsys):
    def command():
        raise InvalidInputError("`n` must be\nsmall. Got 9.")

    assert run(command) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "Error: `n` must be small. Got 9.\n")


def test_a_bug_keeps_its_traceback():
    def command():
        raise ZeroDivisionError("bug")

    with pytest.raises(ZeroDivisionError):
        run(command)


def test_wrong_usage_is_exit_2(capsys):
    assert run(lambda: None, "--nonsense") == 2
    assert "No such option" in capsys.readouterr().err
    assert exit_code(group_of(lambda: None), ["dx"]) == 2
    assert "No such command" in capsys.readouterr().err


def test_no_command_shows_the_help_and_is_exit_2(capsys):
    assert exit_code(group_of(lambda: None), []) == 2
    assert "Usage: tool" in capsys.readouterr().err


def test_help_is_exit_0(capsys):
    assert exit_code(group_of(lambda: None), ["--help"]) == 0
    assert "Usage: tool" in capsys.readouterr().out


def test_images_left_out_is_exit_3():
    assert run(lambda: leave(3)) == 3


def test_ctrl_c_says_how_to_go_on_and_is_exit_130(capsys):
    def command():
        with resumable("Run it again."):
            raise KeyboardInterrupt

    assert run(command) == 130
    assert capsys.readouterr().err == "\nInterrupted. Run it again.\n"


def test_ctrl_c_elsewhere_is_exit_130_too(capsys):
    def command():
        raise KeyboardInterrupt

    assert run(command) == 130
    assert "Interrupted." in capsys.readouterr().err


@dataclass
class Report:
    path: Path
    value: float
    sizes: tuple[int, ...]


def test_json_is_one_object_with_plain_values(capsys):
    report = Report(path=Path("a/b"), value=float("nan"), sizes=(1, 2))
    print_json({"report": report, "n": np.int64(3), "x": np.float32(0.5), "a": np.arange(2)})
    assert json.loads(capsys.readouterr().out) == {
        "report": {"path": "a/b", "value": None, "sizes": [1, 2]},
        "n": 3,
        "x": 0.5,
        "a": [0, 1],
    }


def test_plain_keeps_what_json_knows():
    assert plain({"a": [True, None, 1, 0.25, "x"]}) == {"a": [True, None, 1, 0.25, "x"]}

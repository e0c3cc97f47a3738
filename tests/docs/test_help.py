"""Every command explains itself: a sentence, an example that parses, every option described."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli.common import exit_code
from cli.featstore_app import featstore
from cli.heads_app import heads

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {"featstore": featstore, "heads": heads}
COMMANDS = {
    "featstore": (
        "extract info ls show cka backbones datasets sql verify reindex du rm compact gc copy "
        "merge demo"
    ).split(),
    "heads": (
        "train adapt evaluate predict export layers protocol table figure show ls rm describe "
        "presets"
    ).split(),
}
PAIRS = [(program, name) for program, names in COMMANDS.items() for name in names]


def help_of(program, *names):
    with click.Context(PROGRAMS[program], info_name=program) as context:
        if not names:
            return PROGRAMS[program].get_help(context)
        command = PROGRAMS[program].commands[names[0]]
        with click.Context(command, info_name=names[0], parent=context) as inner:
            return command.get_help(inner)


def example_lines(text):
    """Commands below the last "Example:" of a help text, continuation lines joined."""
    _, found, block = text.partition("Example:\n")
    assert found, "no example"
    lines: list[str] = []
    for line in block.split("\n\n")[0].splitlines():
        stripped = line.strip()
        if stripped.startswith(("featstore", "heads")):
            lines.append(stripped)
        elif lines:
            lines[-1] += " " + stripped
    return lines


def test_the_commands_are_those_promised():
    found = {program: sorted(PROGRAMS[program].commands) for program in PROGRAMS}
    assert found == {program: sorted(names) for program, names in COMMANDS.items()}


@pytest.mark.parametrize(("program", "name"), PAIRS)
def test_every_command_has_an_example_that_parses(program, name):
    lines = example_lines(help_of(program, name))
    own = [line for line in lines if shlex.split(line)[:2] == [program, name]]
    assert own, f"no example of {program} {name} itself"
    for line in lines:
        called, command_name, *args = shlex.split(line)
        command = PROGRAMS[called].commands[command_name]
        with click.Context(PROGRAMS[called], info_name=called) as parent:
            # Parses and converts every value, and does not run the command.
            command.make_context(command_name, args, parent=parent).close()


@pytest.mark.parametrize(("program", "name"), PAIRS)
def test_every_option_is_described(program, name):
    command = PROGRAMS[program].commands[name]
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert command.get_short_help_str(limit=200).endswith(".")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_group_has_examples_too(program):
    for line in example_lines(help_of(program)):
        called, name, *_ = shlex.split(line)
        assert name in COMMANDS[called]


@pytest.mark.parametrize(("program", "name"), PAIRS)
def test_a_command_that_reports_can_do_so_in_json(program, name):
    names = {param.name for param in PROGRAMS[program].commands[name].params}
    assert "as_json" in names


@pytest.mark.parametrize(("program", "name"), [*PAIRS, ("featstore", None), ("heads", None)])
def test_help_is_shown_and_is_no_error(program, name, capsys):
    assert exit_code(PROGRAMS[program], [*([name] if name else []), "--help"]) == 0
    assert f"Usage: {program}" in capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_at_once(program):
    # Half a second is the promise; processor time keeps it apart from whatever else runs here.
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", f"cli.{program}_app", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    after = os.times()
    seconds = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    assert 0 < seconds < 0.5


@pytest.mark.parametrize("program", PROGRAMS)
def test_shell_completion_lists_the_commands(program):
    variables = {
        **os.environ,
        f"_{program.upper()}_COMPLETE": "bash_complete",
        "COMP_WORDS": f"{program} ",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", f"cli.{program}_app"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {line.rpartition(",")[2] for line in done.stdout.splitlines()}
    assert set(COMMANDS[program]) <= found

"""The `featstore` command: extract features, look into a store, keep it in order."""

from __future__ import annotations

from typing import NoReturn

import click

from cli.care_commands import reindex, verify
from cli.catalogue_commands import backbones, datasets
from cli.cka_command import cka
from cli.common import SETTINGS, run_and_exit
from cli.copy_commands import copy, merge
from cli.demo import demo
from cli.extract_command import extract
from cli.removal_commands import compact, gc, rm
from cli.show_features_command import show
from cli.sql_command import sql
from cli.store_commands import info, ls
from cli.usage_command import du
from featstore.version import __version__


@click.group("featstore", context_settings=SETTINGS)
@click.version_option(__version__, prog_name="featstore")
def featstore() -> None:
    """Run a frozen vision backbone once and keep its activations in a store.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished with images left out, 130 interrupted.

    \b
    Example:
        featstore extract --backbone dinov2_b --data nyu:/data/nyu
        featstore info
        heads train --task depth
    """


COMMANDS = (
    extract,
    info,
    ls,
    show,
    cka,
    backbones,
    datasets,
    sql,
    verify,
    reindex,
    du,
    rm,
    compact,
    gc,
    copy,
    merge,
    demo,
)
for command in COMMANDS:
    featstore.add_command(command)


def main() -> NoReturn:
    """Run `featstore` as a program."""
    run_and_exit(featstore)


if __name__ == "__main__":
    main()

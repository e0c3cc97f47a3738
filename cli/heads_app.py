"""The `heads` command: train tiny heads from a store, measure them, use them."""

from __future__ import annotations

from typing import NoReturn

import click

from cli.adapt_command import adapt
from cli.common import SETTINGS, run_and_exit
from cli.describe_command import describe
from cli.export_command import export
from cli.figure_command import figure
from cli.layers_command import layers
from cli.predict_command import predict
from cli.presets_command import presets
from cli.protocol_command import protocol
from cli.run_commands import evaluate, ls, rm
from cli.show_command import show
from cli.table_command import table
from cli.train_command import train
from featstore.version import __version__


@click.group("heads", context_settings=SETTINGS)
@click.version_option(__version__, prog_name="heads")
def heads() -> None:
    """Train tiny heads on stored activations; the backbone is not needed again.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished with images left out, 130 interrupted.

    \b
    Example:
        heads train --task depth
        heads evaluate @last
        heads predict @last --images photos/ --out predictions/
    """


COMMANDS = (
    train,
    adapt,
    evaluate,
    predict,
    export,
    layers,
    protocol,
    table,
    figure,
    show,
    ls,
    rm,
    describe,
    presets,
)
for command in COMMANDS:
    heads.add_command(command)


def main() -> NoReturn:
    """Run `heads` as a program."""
    run_and_exit(heads)


if __name__ == "__main__":
    main()

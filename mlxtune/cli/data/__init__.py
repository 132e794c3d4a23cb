"""`mlxtune data`: commands on examples, before anything is trained on them. One file per command."""

import click

from mlxtune.cli.data import check


@click.group("data")
def command() -> None:
    """Check data before training.

    \b
    Example:
      mlxtune data check tickets
    """


for each in (check,):
    command.add_command(each.command)

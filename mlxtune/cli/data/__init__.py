"""`mlxtune data`: commands on examples, before anything is trained on them. One file per command."""

import click

from mlxtune.cli.data import check, convert, preview, split


@click.group("data")
def command() -> None:
    """Check, look at, convert and split examples.

    \b
    Examples:
      mlxtune data check tickets
      mlxtune data preview tickets --model tiny
    """


for each in (check, convert, preview, split):
    command.add_command(each.command)

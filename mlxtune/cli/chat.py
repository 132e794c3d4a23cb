"""`mlxtune chat`: a conversation in the terminal, or through a pipe. Knows lines, commands and keys, not models.

Answers go to stdout, everything else to stderr. With stdin at a terminal there are prompts, remarks and Ctrl-C;
from a pipe each line is a message and the first mistake ends the command.
"""

import contextlib
import difflib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.generate import FiniteRange, dim, harmless, load, show, speed
from mlxtune.errors import InputError, MlxtuneError

if TYPE_CHECKING:
    from mlxtune.chat import Conversation
    from mlxtune.generate import Piece

COMMANDS = {
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does",
    "/clear": "forget the conversation; the system prompt stays",
    "/system": "TEXT: set the system prompt; without TEXT, remove it",
    "/save": "FILE: write the conversation as a row of training data",
    "/retry": "answer the last message again",
    "/undo": "take back the last message and its answer",
}
QUOTES = '"""'


@click.command()
@click.option("--model", "name", required=True, metavar="MODEL", help="Folder, hub id, or `tiny`, the embedded model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--adapter-path", metavar="FOLDER", help="Adapter to use with the model.")
@click.option("--system-prompt", metavar="TEXT", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--temp", type=FiniteRange(min=0), default=0.0, show_default=True, help="0: the likeliest token always.")
@click.option(
    "--top-p",
    type=FiniteRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that hold this share of the probability.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the draws.")
def command(
    name: str,
    revision: str | None,
    adapter_path: str | None,
    system_prompt: str | None,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int,
) -> None:
    """Chat with a model in the terminal; Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.

    From a pipe, each line is a message, and only the answers go to stdout.

    \b
    Examples:
      mlxtune chat --model tiny --temp 0.7
      echo "My card has not arrived." | mlxtune chat --model tiny
    """
    from mlxtune import chat, hub

    chat.check(hub.fetch(name, revision))
    lm = load(name, revision, adapter_path)
    talk = chat.Conversation(lm, system=system_prompt, max_tokens=max_tokens, temp=temp, top_p=top_p, seed=seed)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  history and editing for input()
        display.note(f"Chatting with {name}. /help shows the commands, Ctrl-D leaves.")
    while True:
        try:
            line = _next_message(interactive)
            if line is None:
                break
            text, is_command = line
            if is_command and text.split()[0] in ("/exit", "/quit"):
                return
            pieces = _obey(talk, text) if is_command else talk.say(text) if text.strip() else None
            if pieces is not None:
                _answer(talk, pieces, interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            display.note("\n(Ctrl-D or /exit leaves)")
        except MlxtuneError as error:
            if not interactive:
                raise
            display.note(click.style("error: ", fg="red", bold=True) + harmless(str(error)))
    if interactive:
        display.note("")

"""`mlxtune generate`: one prompt in, its answer out as it comes. Knows how answers are shown, not how they are made."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.errors import InputError

if TYPE_CHECKING:
    from mlxtune.generate import Piece
    from mlxtune.model import LanguageModel

Command = Callable[..., Any]


class FiniteRange(click.FloatRange):
    """A range of numbers; `nan` compares with no bound and `inf` may have none, so both are refused here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not in the range {self._describe_range()}.", param, ctx)
        return number


def answer_flags(command: Command) -> Command:
    """Adds the flags that name a model and say how it answers."""
    for flag in reversed(
        [
            click.option("--model", "name", required=True, metavar="TEXT", help="a folder, a hub id, or `tiny`"),
            click.option("--revision", metavar="TEXT", help="branch, tag or commit of a hub id"),
            click.option("--adapter-path", type=click.Path(path_type=Path), metavar="DIR", help="adapter to use"),
            click.option("--system-prompt", metavar="TEXT", help="what the model is told before the first message"),
            click.option(
                "--max-tokens", type=click.IntRange(min=1), default=256, metavar="N", help="longest answer  [256]"
            ),
            click.option(
                "--temp", type=FiniteRange(min=0), default=0.0, metavar="X", help="0: always the likeliest token  [0]"
            ),
            click.option(
                "--top-p",
                type=FiniteRange(min=0, max=1, min_open=True),
                default=1.0,
                metavar="X",
                help="draw from the likeliest tokens that hold this share of the probability  [1]",
            ),
            click.option(
                "--seed", type=click.IntRange(0, 2**63 - 1), default=0, metavar="N", help="seed of the draws  [0]"
            ),
        ]
    ):
        command = flag(command)
    return command


def load(path: Path, adapter_path: Path | None) -> "LanguageModel":
    """The model of a folder, with its adapter; the adapter's files are checked before the weights are read."""
    from mlxtune import adapter, model

    if adapter_path is not None:
        adapter.check(adapter_path)
    lm = model.load(path)
    if adapter_path is not None:
        adapter.load(lm, adapter_path)
    return lm


def shown(pieces: "Iterable[Piece]") -> "Iterator[Piece]":
    """The pieces, each written to stdout as it comes: harmless where stdout is a terminal, else as it is."""
    terminal = sys.stdout.isatty()
    for piece in pieces:
        click.echo(display.harmless(piece.text) if terminal else piece.text, nl=False)
        yield piece


def remark(text: str) -> None:
    """A dim line below an answer, for someone at a terminal: nothing where stderr goes elsewhere."""
    if sys.stderr.isatty():
        click.echo(click.style(f"  {text}", dim=True), err=True)


def speed(last: "Piece") -> str:
    """What an answer took, from its last piece: `42 tokens, 350 tokens/s, 0.12 GB`."""
    rate = [f"{last.tokens_per_second:.0f} tokens/s"] if last.tokens_per_second else []
    return ", ".join([display.count(last.answer_tokens, "token"), *rate, f"{last.peak_memory_gb:.2f} GB"])


@click.command("generate", short_help="answer one prompt")
@answer_flags
@click.option("--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin")
@click.option("--ignore-chat-template", is_flag=True, help="continue the prompt as plain text")
@click.option("--json", "as_json", is_flag=True, help="print the answer and its figures as JSON")
def command(
    name: str,
    revision: str | None,
    adapter_path: Path | None,
    system_prompt: str | None,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int,
    prompt: str,
    ignore_chat_template: bool,
    as_json: bool,
) -> None:
    """Answer one prompt; only the answer goes to stdout.

    A model without a chat template continues the prompt as plain text.

    \b
    Example:
      mlxtune generate --model tiny --prompt "Ticket: my card has not arrived. Label:"
    """
    text = _stdin_text() if prompt == "-" else prompt
    from mlxtune import generate

    lm = load(fetch(name, revision), adapter_path)
    if lm.has_chat_template and not ignore_chat_template:
        system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        tokens = generate.prompt_tokens(lm, [*system, {"role": "user", "content": text}])
    elif system_prompt is None:
        tokens = generate.text_tokens(lm, text)
    else:
        raise InputError("--system-prompt needs a chat template", where=name, hint="put the text into --prompt")
    allowed = generate.room(lm, len(tokens), max_tokens, "shorten the prompt")
    pieces = generate.stream(lm, tokens, max_tokens=allowed, temp=temp, top_p=top_p, seed=seed)
    with closing(pieces):
        if as_json:
            _print_json(name, text, list(pieces))
            return
        for piece in shown(pieces):
            last = piece
    click.echo()
    fed = f"prompt: {display.count(last.prompt_tokens, 'token')}, {last.prompt_tokens_per_second:.0f} tokens/s"
    remark(f"{speed(last)}; {fed}{'; cut, the answer is longer' if last.finish_reason == 'length' else ''}")


def _stdin_text() -> str:
    """All of stdin, without the newline that `echo` adds. Raises InputError."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise InputError("is not UTF-8", where="stdin", hint="save the text as UTF-8") from None


def _print_json(name: str, prompt: str, pieces: "list[Piece]") -> None:
    last = pieces[-1]
    value = {
        "model": name,
        "prompt": prompt,
        "answer": "".join(piece.text for piece in pieces),
        "prompt_tokens": last.prompt_tokens,
        "answer_tokens": last.answer_tokens,
        "tokens_per_second": round(last.tokens_per_second, 1) or None,
        "finish_reason": last.finish_reason,
    }
    display.result_json(value)

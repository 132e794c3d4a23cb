"""`mlxtune generate`: one prompt in, its answer to stdout as it comes. Knows how an answer is shown, not how it is made."""

import json
import math
import re
import sys
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from mlxtune.generate import Piece
    from mlxtune.model import LanguageModel

# what moves a terminal's cursor, colours it, or turns text around: C0 but tab and newline, DEL, C1, bidi overrides
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    r"""Text for a terminal: control characters as visible escapes, such as \x1b."""
    return CONTROLS.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class FiniteRange(click.FloatRange):
    """A range that refuses `nan` and `inf`, which compare with no bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a number in the range {self._describe_range()}.", param, ctx)
        return number


def load(name: str, revision: str | None, adapter_path: str | None) -> "LanguageModel":
    """The model that the flags name, its adapter attached."""
    from pathlib import Path

    from mlxtune import adapter, hub, model

    lm = model.load(hub.fetch(name, revision))
    if adapter_path is not None:
        adapter.load(lm, Path(adapter_path))
    return lm


def show(pieces: "Iterable[Piece]") -> "Iterable[Piece]":
    """Writes each piece to stdout as it comes, harmless where stdout is a terminal, and passes it on."""
    terminal = sys.stdout.isatty()
    for piece in pieces:
        click.echo(harmless(piece.text) if terminal else piece.text, nl=False)
        yield piece


def speed(piece: "Piece") -> str:
    """What an answer took, from its last piece: `42 tokens, 350 tokens/s, 0.12 GB`."""
    parts = [display.count(piece.answer_tokens, "token")]
    if piece.tokens_per_second:
        parts.append(f"{piece.tokens_per_second:.0f} tokens/s")
    return ", ".join([*parts, f"{piece.peak_memory_gb:.2f} GB"])


def dim(text: str) -> None:
    """A remark for someone at a terminal: dim on stderr, nothing where stderr goes elsewhere."""
    if sys.stderr.isatty():
        click.echo(click.style(f"  {text}", dim=True), err=True)


@click.command()
@click.option("--model", "name", required=True, metavar="MODEL", help="Folder, hub id, or `tiny`, the embedded model.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--adapter-path", metavar="FOLDER", help="Adapter to use with the model.")
@click.option("--prompt", required=True, metavar="TEXT", help="The prompt; `-` reads it from stdin.")
@click.option("--system-prompt", metavar="TEXT", help="System prompt, for models with a chat template.")
@click.option("--ignore-chat-template", is_flag=True, help="Continue the prompt as plain text.")
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
@click.option("--json", "as_json", is_flag=True, help="Print the answer and its figures as JSON.")
def command(
    name: str,
    revision: str | None,
    adapter_path: str | None,
    prompt: str,
    system_prompt: str | None,
    ignore_chat_template: bool,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Answer one prompt; only the answer goes to stdout.

    A model without a chat template continues the prompt as plain text.

    \b
    Example:
      mlxtune generate --model tiny --prompt "Is this a complaint? My card has not arrived."
    """
    text = _from_stdin() if prompt == "-" else prompt
    from mlxtune import generate

    lm = load(name, revision, adapter_path)
    if lm.has_chat_template and not ignore_chat_template:
        system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        tokens = generate.prompt_tokens(lm, [*system, {"role": "user", "content": text}])
    elif system_prompt is not None:
        reason = "--ignore-chat-template" if lm.has_chat_template else "a model without one"
        raise InputError(f"--system-prompt needs a chat template, but this is {reason}", hint="put it into --prompt")
    else:
        tokens = generate.text_tokens(lm, text)
    allowed = generate.room(lm, len(tokens), max_tokens, "shorten the prompt")
    stream = generate.stream(lm, tokens, max_tokens=allowed, temp=temp, top_p=top_p, seed=seed)
    with closing(stream):
        if as_json:
            _print_json(name, text, list(stream))
            return
        for piece in show(stream):
            last = piece
    click.echo()
    dim(f"{speed(last)}; prompt: {display.count(last.prompt_tokens, 'token')}, "
        f"{last.prompt_tokens_per_second:.0f} tokens/s")  # fmt: skip


def _from_stdin() -> str:
    """Stdin as text, without the newline that `echo` adds. Raises InputError."""
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
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # JSON lets C1 and bidi controls stand as they are; escaped, they mean the same
    display.result(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line))

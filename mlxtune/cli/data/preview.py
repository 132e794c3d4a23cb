"""`mlxtune data preview`: rows as a model will see them, and which part of them it learns. Loads only a tokenizer."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import colour, display
from mlxtune.cli.data.places import hidden_folder, on_one_line
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.errors import DataError

if TYPE_CHECKING:
    from mlxtune.data.render import Sample

BEGIN, END = "⟦", "⟧"  # around what is learned, where there are no colours


@click.command("preview", short_help="rows as a model sees them, and what it learns of them")
@click.argument("path", metavar="FILE", required=False)
@config_flag
@click.option("-n", "count", type=click.IntRange(min=1), default=3, metavar="N", help="rows to show  [3]")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object a sample, with every token")
@recipe_flags("model", "revision", "data.mask_prompt", "train.max_seq_length")
def command(
    path: str | None, config: Path | None, count: int, as_json: bool, sets: tuple[str, ...], **flags: Any
) -> int:
    """Show the first rows of FILE as the chat template of a model writes them, with the part that is learned marked.

    At a terminal it is green; elsewhere it stands between ⟦ and ⟧. A row that cannot be rendered exactly is shown with
    the reason for which training would refuse it; the exit code is then 2.

    \b
    Examples:
      mlxtune data preview tickets --model tiny
      mlxtune data preview tickets --model tiny -n 1 --json
    """
    recipe = build_recipe(config, flags, sets)
    from mlxtune import model
    from mlxtune.data import load
    from mlxtune.data.render import Limit, render
    from mlxtune.tokenizer import inner, load_for_rows

    data = recipe.data if path is None else replace(recipe.data, path=path)
    files = load.files_of(data)
    rows = load.read_examples(next(iter(files.values())), data)[:count]
    source = fetch(recipe.model, recipe.revision)
    config_json = model.check(source)
    tokenizer, _ = load_for_rows(source, config_json, data.chat_template)
    limit = Limit.of(recipe.train.max_seq_length, model.context_length(config_json))
    hidden = hidden_folder(files)
    refused = False
    for number, pair in enumerate(rows):
        row = pair[0]
        try:
            found = render([pair], inner(tokenizer), tokenizer.eos_token_ids, data, limit)
        except DataError as error:
            refused = True
            reason = str(error).removeprefix(f"{row.where}: ")
            show_left_out(row.where.removeprefix(hidden), row.line, f"refused: {reason}", as_json)
            continue
        if not found.samples:
            show_left_out(row.where.removeprefix(hidden), row.line, f"left out: {found.losses}", as_json)
        for sample in found.samples:
            if as_json:
                display.result_json(as_object(row.line, sample, tokenizer))
            else:
                show(sample, tokenizer, hidden)
        if not as_json and number + 1 < len(rows):
            display.result()
    return 2 if refused else 0


def show_left_out(where: str, line: int, note: str, as_json: bool) -> None:
    if as_json:
        display.result_json({"line": line, "text": None, "tokens": [], "trained": [], "notes": [note]})
    else:
        display.result(click.style(on_one_line(where), bold=True))
        display.result(f"  {click.style(on_one_line(note), fg='red')}")


def as_object(line: int, sample: "Sample", tokenizer: Any) -> dict[str, Any]:
    """A sample as JSON; `trained[t]` says whether token t is learned."""
    return {
        "line": line,
        "text": tokenizer.decode(sample.tokens),
        "tokens": sample.tokens,
        "trained": sample.trained,
        "notes": list(sample.notes),
    }


def show(sample: "Sample", tokenizer: Any, hidden: str) -> None:
    """A sample for people: its counts, its text, its notes."""
    counts = f"{display.count(len(sample.tokens), 'token')}, {sample.trained_count:,} learned"
    display.result(f"{click.style(on_one_line(sample.where.removeprefix(hidden)), bold=True)}  {counts}")
    coloured = sys.stdout.isatty() and colour() is None
    for text, learned in stretches(sample, tokenizer):
        shown = display.harmless(text)
        if learned:
            shown = click.style(shown, fg="green", bold=True) if coloured else f"{BEGIN}{shown}{END}"
        click.echo(shown, nl=False)
    if not text.endswith("\n"):
        display.result()
    for note in sample.notes:
        display.result(click.style(f"  {note}", dim=True))


def stretches(sample: "Sample", tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a sample in stretches that are learned, or not.

    Each is what the text grows by: a stretch decoded by itself may lose its leading space.
    """
    ends = [at for at in range(1, len(sample.tokens)) if sample.trained[at] != sample.trained[at - 1]]
    found, before = [], ""
    for end in (*ends, len(sample.tokens)):
        text = tokenizer.decode(sample.tokens[:end])
        found.append((text[len(before) :], sample.trained[end - 1]))
        before = text
    return found

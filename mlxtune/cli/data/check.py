"""`mlxtune data check`: what is wrong with the examples, before anything is trained on them; and a cleaned copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.data.places import hidden_folder, on_one_line
from mlxtune.cli.fetch import fetch
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags

if TYPE_CHECKING:
    from mlxtune.data.audit import Audit, Counting, Finding, Table
    from mlxtune.data.fix import Fixed
    from mlxtune.recipe import Recipe

COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}
SHOWN, NAMED = 3, 20  # places of a finding in the report, and in JSON
KINDS = {"near_duplicate": "near-duplicate", "pii": "personal data", "stale_fact": "stale fact"}
LABELS = 12  # rows of the label table
LABEL_WIDTH, BAR = 40, 24  # characters
STEPS = "▁▂▃▄▅▆▇█"


@click.command("check", short_help="what is wrong with the examples")
@click.argument("path", required=False)
@click.option("--json", "as_json", is_flag=True, help="print one JSON value instead of the report")
@click.option("--strict", is_flag=True, help="exit with 1 where there are warnings")
@click.option("--fast", is_flag=True, help="do not search for near-duplicates")
@click.option("--names", is_flag=True, help="look for names and places too, which needs mlxtune[pii]")
@click.option("--label", metavar="REGEX", help="its first group, found in an answer, is the row's label")
@config_flag
@click.option(
    "--fix", "out", type=click.Path(path_type=Path), metavar="OUT", help="write a cleaned copy: a file, or a folder"
)
@click.option("--redact", is_flag=True, help="replace personal data in the copy: [EMAIL_1]")
@click.option(
    "--redact-map", type=click.Path(path_type=Path), metavar="FILE", help="write what each placeholder stands for"
)
@click.option(
    "--places",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"name up to N rows of each finding.  [{SHOWN}, in JSON {NAMED}]",
)
@recipe_flags("model", "revision", "train.max_seq_length")
def command(
    path: str | None,
    as_json: bool,
    strict: bool,
    fast: bool,
    names: bool,
    label: str | None,
    config: Path | None,
    out: Path | None,
    redact: bool,
    redact_map: Path | None,
    places: int | None,
    sets: tuple[str, ...],
    **flags: Any,
) -> int:
    """Report malformed rows, repeats, contradictions, leaks between splits, odd labels, personal data and odd answers.

    PATH is a file of examples, a folder of {train,valid,test}.jsonl, or `tickets`, the embedded set; without it, the
    data of the recipe. With --model, tokens are counted too; only the tokenizer is loaded. --fix leaves out copies and
    spells labels one way; it never touches PATH. Exit code: 2 with malformed rows, 1 with --strict and warnings,
    else 0.

    \b
    Examples:
      mlxtune data check tickets
      mlxtune data check my-data/ --strict --fast
      mlxtune data check answers.jsonl --label 'The answer is (\\d+)' --json
      mlxtune data check tickets.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max-seq-length 512
      mlxtune data check tickets.jsonl --fix clean.jsonl --redact
    """
    from mlxtune.data import pii
    from mlxtune.data.audit import examine, read
    from mlxtune.data.files import check_target
    from mlxtune.data.load import files_of
    from mlxtune.data.pii import presidio
    from mlxtune.rundir import refuse_existing

    if redact and out is None:
        raise click.UsageError("--redact changes the copy that --fix OUT writes: name OUT")
    if redact_map is not None and not redact:
        raise click.UsageError("--redact-map belongs to --redact")
    if redact_map is not None and out is not None and redact_map.absolute() == out.absolute():
        raise click.UsageError("--redact-map and --fix name the same file")
    recipe = build_recipe(config, flags, sets)
    if path is not None:
        recipe = replace(recipe, data=replace(recipe.data, path=path))
    if recipe.data.path is None:
        raise click.UsageError("name a file or folder, or a recipe that has data.path")
    files = files_of(recipe.data)
    if out is not None:
        check_target(out, "--fix", folder="all" not in files)
    if redact_map is not None:
        refuse_existing(redact_map, "--redact-map")
    label = label or recipe.evaluate.label
    find = presidio.find if names else pii.find
    find("")  # a missing library is found before the rows are read
    named = places or (NAMED if as_json else SHOWN)
    with display.phases() as shown:
        counting = None if flags["recipe_model"] is None else _counting(recipe, lambda *row: shown("tokens", *row))
        table = read(files, recipe.data, label, near=not fast, places=named, find=find)
        found = examine(table, counting)
    fixed = None if out is None else _fix(table, recipe.data.group_by, out, redact, redact_map)
    if as_json:
        value = found.to_dict()
        display.result_json(value if fixed is None else {**value, "fix": _fix_value(fixed, out)})
    else:
        hidden = hidden_folder(files)
        show(found, named, hidden)
        if fixed is not None:
            show_fix(fixed, found, out, hidden)
    if found.has("error"):
        return 2
    return 1 if strict and found.has("warning") else 0


def _counting(recipe: Recipe, on_row: Callable[[int, int], None]) -> Counting:
    """How the recipe's model counts tokens. Fetches the model, loads its tokenizer."""
    from mlxtune import model
    from mlxtune.data.audit import Counting
    from mlxtune.data.render import Limit
    from mlxtune.tokenizer import inner, load_for_rows

    source = fetch(recipe.model, recipe.revision)
    config = model.check(source)
    tokenizer, _ = load_for_rows(source, config, recipe.data.chat_template)
    return Counting(
        model=recipe.model,
        tokenizer=inner(tokenizer),
        ends=tokenizer.eos_token_ids,
        data=recipe.data,
        limit=Limit.of(recipe.train.max_seq_length, model.context_length(config)),
        on_row=on_row,
    )


def _fix(table: Table, group_by: str | None, out: Path, redact: bool, map_file: Path | None) -> Fixed:
    """Writes the cleaned copy, and the map of placeholders where it is asked for."""
    from mlxtune.data import fix
    from mlxtune.data.redact import redact as replaced
    from mlxtune.rundir import write_json

    fixed = fix.fix(table, group_by, (lambda example: replaced(example, find=table.find)) if redact else None)
    fix.write(fixed, out)
    if map_file is not None:
        write_json(map_file, fix.redact_map(fixed, out))
        map_file.chmod(0o600)  # it holds what was taken out
    return fixed


def _fix_value(fixed: Fixed, out: Path | None) -> dict[str, Any]:
    changes = [change.to_dict() for change in fixed.changes]
    return {"out": str(out), "rows_read": fixed.read, "rows_written": fixed.count, "changes": changes}


def show(found: Audit, places: int, hidden: str) -> None:
    """The report for people; `hidden` is left out of places."""
    for file in found.files:
        split = "" if file["split"] == "all" else f"{file['split']}: "
        path = on_one_line(file["path"].removeprefix(hidden))
        display.result(f"{split}{path}  {display.count(file['rows'], 'row')}")
    for part in ("prompt", "answer"):
        spread = found.stats[f"{part}_characters"]
        if spread:
            display.result(_lengths(f"{part}s of", spread, "characters"))
    if "tokens" in found.stats:
        show_tokens(found.stats["tokens"])
    for finding in found.findings:
        show_finding(finding, places, hidden)
    labels = found.stats.get("labels")
    if labels:
        display.result()
        show_labels(labels)
    display.result()
    display.result(click.style(summary(found), bold=True))


def _lengths(what: str, spread: dict[str, Any], unit: str) -> str:
    line = f"{what} {spread['min']:,} to {spread['max']:,} {unit}, median {spread['median']:,}"
    bars = histogram([step["rows"] for step in spread["histogram"]])
    return line if not bars else f"{line}  {click.style(bars, dim=True)}"


def histogram(counts: list[int]) -> str:
    """One bar a step, from the shortest to the longest; empty where all are about equally long."""
    if len(counts) < 4:
        return ""
    most = max(counts)
    return "".join(STEPS[-(-count * (len(STEPS) - 1) // most)] if count else " " for count in counts)


def show_tokens(tokens: dict[str, Any]) -> None:
    """What the rows are for a model: lengths in tokens, what does not fit, and what an epoch costs."""
    if tokens["row"] is None:
        return
    display.result(_lengths("rows of", tokens["row"], "tokens") + f"  {tokens['model']}")
    display.result(_lengths("learned:", tokens["trained"], "tokens a row"))
    bound, epoch = tokens["max_seq_length"], tokens["epoch"]
    fit = f"{display.count(tokens['too_long'], 'row')} over" if tokens["too_long"] else "every row within"
    display.result(f"{fit} {bound:,} tokens")
    cost = f"{epoch['tokens']:,} tokens, {epoch['trained']:,} of them learned"
    display.result(f"an epoch: {display.count(epoch['rows'], 'row')}, {cost}")


def show_finding(finding: Finding, places: int, hidden: str) -> None:
    """One finding: how bad and what, up to `places` places, and what to do."""
    severity = click.style(f"{finding.severity:<8}", fg=COLOURS[finding.severity], bold=True)
    display.result()
    kind = KINDS.get(finding.kind, finding.kind)
    display.result(f"{severity} {kind}, {display.count(finding.count, 'row')}: {on_one_line(finding.detail)}")
    more = f"and {finding.count - places:,} more" if finding.count > places else ""
    if finding.notes:
        pairs = zip(finding.where[:places], finding.notes[:places], strict=True)
        lines = [f"{where}  {note}".rstrip() for where, note in pairs]
        lines += [more] if more else []
    else:
        lines = [f"{', '.join(finding.where[:places])} {more}".rstrip()]
    for line in lines:
        display.result(f"         {on_one_line(line.replace(hidden, '') if hidden else line)}")
    display.result(click.style(f"         → {on_one_line(finding.advice)}", dim=True))


def show_labels(labels: dict[str, int]) -> None:
    """A table of the labels, the most frequent first, with bars; of many only the ends."""
    total, most = sum(labels.values()), max(labels.values())
    ordered = list(labels.items())
    few = ordered if len(ordered) <= LABELS else [*ordered[: LABELS - 3], *ordered[-2:]]
    rows = [
        [
            on_one_line(label)[:LABEL_WIDTH],
            f"{count:,}",
            f"{count / total:.1%}",
            ("█" * max(1, round(count / most * BAR))).ljust(BAR),
        ]
        for label, count in few
    ]
    if len(few) < len(ordered):
        rows.insert(LABELS - 3, [f"… {display.count(len(ordered) - len(few), 'more label')}", "", "", ""])
    display.table(["label", "rows", "share", ""], rows)


def show_fix(fixed: Fixed, found: Audit, out: Path | None, hidden: str) -> None:
    """What the cleaned copy has otherwise, and what is left for a person."""
    display.result()
    display.result(f"{click.style('written', fg='green', bold=True)}  {out}  {fixed.count:,} of {fixed.read:,} rows")
    for change in fixed.changes:
        more = f" and {change.count - len(change.where):,} more" if change.count > len(change.where) else ""
        where = ", ".join(change.where)
        where = where.replace(hidden, "") if hidden else where
        display.result(f"         {change.count:,} × {on_one_line(f'{change.what}: {where}{more}')}")
    if not fixed.changes:
        display.result("         nothing to clean")
    left = [each for each in found.findings if each.kind in ("contradiction", "leak") and each.severity != "info"]
    for finding in left:
        display.result(f"         {finding.count:,} × left for you: {finding.kind}, see above")


def summary(found: Audit) -> str:
    """The last line: how many findings of each severity."""
    counts = [
        display.count(sum(finding.severity == severity for finding in found.findings), noun)
        for severity, noun in (("error", "error"), ("warning", "warning"), ("info", "note"))
        if found.has(severity)
    ]
    return f"{display.count(found.rows, 'row')} checked: {', '.join(counts) if counts else 'nothing found'}"

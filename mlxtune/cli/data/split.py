"""`mlxtune data split`: one file as train, valid and test, without a leak from one to the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import display
from mlxtune.cli.data.places import hidden_folder, on_one_line
from mlxtune.cli.flags import build_recipe, config_flag, recipe_flags
from mlxtune.errors import DataError

if TYPE_CHECKING:
    from mlxtune.data.load import Rows
    from mlxtune.data.similar import Alike

NEAR = 0.8  # the similarity to report on, beside the one that keeps rows together
SHOWN = 3  # places of rows that are left out
LABELS, LABEL_WIDTH = 30, 40  # rows of the label table, characters

Sides = Sequence[str | None]


@click.command("split", short_help="one file as train, valid and test, without leaks")
@click.argument("path", metavar="FILE", required=False)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="folder to write")
@click.option("--test", "recipe_data__test", type=float, metavar="X", help="share of rows for the test  [0.1]")
@click.option("--valid", "recipe_data__valid", type=float, metavar="X", help="share of rows for validation  [0.1]")
@click.option("--group-by", "recipe_data__group_by", metavar="FIELD", help="column whose equal values stay together")
@click.option("--stratify/--no-stratify", default=True, help="give each part its share of every label  [true]")
@click.option("--label", metavar="REGEX", help="its first group, found in an answer, is the row's label")
@config_flag
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
@recipe_flags("seed")
def command(
    path: str | None,
    out: Path,
    stratify: bool,
    label: str | None,
    config: Path | None,
    as_json: bool,
    sets: tuple[str, ...],
    **flags: Any,
) -> None:
    """Write the rows of FILE to DIR/{train,valid,test}.jsonl, with all their columns.

    Rows that ask the same, or nearly, stay in one part, and so do equal values of --group-by. Each label gets its share
    of each part. Rows that are added at the end of FILE change the part of no row before them; one that is like rows of
    two parts is left out and named. Shown beside it: how many test rows a split by chance would leak.

    \b
    Examples:
      mlxtune data split tickets --out my-data --group-by cluster
      mlxtune data split answers.jsonl --out my-data --test 0.2 --valid 0 --label '^(\\w+)' --json
    """
    recipe = build_recipe(config, flags, sets)
    from mlxtune.data.load import files_of, read_examples
    from mlxtune.data.similar import neighbours
    from mlxtune.data.split import assign, compared, write
    from mlxtune.rundir import refuse_existing, staged

    refuse_existing(out, "--out")
    data = recipe.data if path is None else replace(recipe.data, path=path)
    files = files_of(data)
    if list(files) != ["all"]:
        raise DataError("is a folder of splits", where=data.path, hint="name one file")
    rows = read_examples(files["all"], data)
    label = label or recipe.evaluate.label
    alike = neighbours(compared(rows))
    sides = assign(rows, data, recipe.seed, label, stratify=stratify, alike=alike)
    with staged(out) as scratch:
        write(scratch, rows, sides)
    hidden = hidden_folder(files)
    left_out = [row.where.removeprefix(hidden) for (row, _), side in zip(rows, sides, strict=True) if side is None]
    found = {
        "out": str(out),
        "rows": dict(counted(sides)),
        "left_out": left_out,
        "labels": by_label(rows, sides, label),
        "leaked": leaks(alike, sides, recipe.seed),
    }
    if as_json:
        display.result_json(found)
    else:
        show(found)


def counted(sides: Sides) -> dict[str, int]:
    """How many rows each part has that has any."""
    from mlxtune.data.split import PARTS

    counts = Counter(sides)
    return {name: counts[name] for name in PARTS if counts[name]}


def by_label(rows: Rows, sides: Sides, label: str | None) -> dict[str, dict[str, int]] | None:
    """The rows of each label in each part, the most frequent label first; None where answers give no labels."""
    from mlxtune.data.formats import answer_text
    from mlxtune.data.labels import find_labels

    labels = find_labels([answer_text(example) for _, example in rows], label)
    if labels is None:
        return None
    placed = [(each, side) for each, side in zip(labels, sides, strict=True) if each is not None and side is not None]
    counts, parts = Counter(placed), counted(sides)
    ordered = Counter(each for each, _ in placed).most_common()
    return {each: {part: counts[each, part] for part in parts} for each, _ in ordered}


def leaks(alike: Alike, sides: Sides, seed: int) -> list[dict[str, float]]:
    """The share of test rows with a neighbour in train: split by chance in the same sizes, and as they are."""
    from mlxtune.data.similar import THRESHOLD
    from mlxtune.data.split import leaked

    tested = max(1, list(sides).count("test"))
    by_chance = list(sides)
    random.Random(seed).shuffle(by_chance)
    return [
        {
            "similarity": near,
            "before": len(leaked(alike, by_chance, near)) / tested,
            "after": len(leaked(alike, sides, near)) / tested,
        }
        for near in (NEAR, THRESHOLD)
    ]


def show(found: dict[str, Any]) -> None:
    """The figures for people."""
    rows, labels = found["rows"], found["labels"]
    total = sum(rows.values()) + len(found["left_out"])
    display.table(["part", "rows", "share"], [[name, f"{n:,}", f"{n / total:.1%}"] for name, n in rows.items()])
    if labels:
        display.result()
        table = [
            [on_one_line(label)[:LABEL_WIDTH], *(f"{counts[part]:,}" for part in rows)]
            for label, counts in list(labels.items())[:LABELS]
        ]
        display.table(["label", *rows], table)
        if len(labels) > LABELS:
            display.result(f"and {display.count(len(labels) - LABELS, 'more label')}")
    if "test" in rows:
        display.result()
        display.table(
            ["test rows with a neighbour in train", "split by chance", "this split"],
            [[f"similarity ≥ {e['similarity']}", f"{e['before']:.1%}", f"{e['after']:.1%}"] for e in found["leaked"]],
        )
    if found["left_out"]:
        places = found["left_out"]
        more = f" and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
        left_out = on_one_line(", ".join(places[:SHOWN])) + more
        display.result()
        display.result(f"{display.count(len(places), 'row')} left out, each like rows of two parts: {left_out}")
    display.result()
    display.result(found["out"])

"""One set of rows -> train, valid and test, with nothing learned from one side to be met on the other.

Knows which rows belong together and which label they have, not what they are for. Rows are placed in file order, each
by what came before it, so that rows added at the end of a file leave the part of every earlier row as it is.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from mlxtune.data.columns import named
from mlxtune.data.files import Row, jsonl
from mlxtune.data.formats import Example, answer_text, prompt_text
from mlxtune.data.labels import label_in
from mlxtune.data.similar import Alike, neighbours
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

Pairs = list[tuple[Row, Example]]
PARTS = ("train", "valid", "test")
GAIN = 0.25  # on the chance of a part, for each row that it is behind its share


def split(rows: Pairs, data: DataRecipe, seed: int, label: str | None) -> dict[str, Pairs]:
    """The rows as `train`, `valid` and `test`, each in file order. As `assign`; what that leaves out is in none."""
    sides = assign(rows, data, seed, label)
    return {name: [pair for pair, side in zip(rows, sides, strict=True) if side == name] for name in PARTS}


def assign(
    rows: Pairs, data: DataRecipe, seed: int, label: str | None, *, stratify: bool = True, alike: Alike | None = None
) -> list[str | None]:
    """The part of each row: `train`, `valid` or `test`; None for a row that is left out.

    A row joins the part of the earlier rows that have an equal or near prompt (see `similar`) or an equal value in the
    column `data.group_by`. Where these are in different parts it would leak from one to the other, and is left out.
    Any other row starts a group. The first groups go one to each part, so that none is empty; a later one goes by
    chance, made of its row and the seed. A part's chance is its share, and more the further it is behind that share of
    all rows so far and of those with the same label; so shares are met as closely as groups allow. The first row of a
    label is learned from, unless the other parts are behind. A share of 0 gives an empty part.

    The label is what the pattern `label` finds in the answer, else the answer's first line; without `stratify` there is
    none. `alike` is `neighbours(compared(rows))`, for callers that have it.

    The part of a row never changes with the rows after it, once a file has the 64 different prompts in which `similar`
    looks for templates; before that, a template found later makes rows unlike that were near.

    Raises DataError if there are fewer groups than parts, or a row lacks the column `data.group_by`.
    """
    known = _Known(alike if alike is not None else neighbours(compared(rows)), _keys(rows, data.group_by))
    strata = [_stratum(example, label) if stratify else None for _, example in rows]
    shares = {"valid": data.valid, "test": data.test}
    first = ["train", *sorted((name for name in shares if shares[name] > 0), key=lambda name: _chance(seed, name))]
    placed, by_stratum = Counter[str](), defaultdict[str | None, Counter[str]](Counter)
    sides: list[str | None] = []
    groups = 0
    for at, (row, _) in enumerate(rows):
        near, counts = known.sides(at), by_stratum[strata[at]]
        if len(near) > 1:
            sides.append(None)
            continue
        if near:
            side = near.pop()
        else:
            side = first[groups] if groups < len(first) else _drawn(_chance(seed, row.value), shares, placed, counts)
            groups += 1
        known.place(at, side)
        placed[side] += 1
        counts[side] += 1
        sides.append(side)
    if groups < len(first):
        raise _too_few(rows, groups, [name for name in PARTS if name in first])
    return sides


def write(folder: Path, rows: Pairs, sides: Sequence[str | None]) -> None:
    """Writes each part that has rows as JSONL, the rows as they were read: use it inside `rundir.staged`."""
    for name in PARTS:
        values = [row.value for (row, _), side in zip(rows, sides, strict=True) if side == name]
        if values:
            (folder / f"{name}.jsonl").write_text(jsonl(values), encoding="utf-8")


def compared(rows: Pairs) -> list[str]:
    """What is compared of each row: its prompt; of a row that asks nothing, what it says."""
    return [prompt_text(example).strip() or answer_text(example) or "" for _, example in rows]


def leaked(alike: Alike, sides: Sequence[str | None], threshold: float) -> list[int]:
    """The places of the test rows that have an equal row in train, or one of at least that similarity."""
    near = _both_ways(alike, threshold)
    learned = {form for form, side in zip(alike.first, sides, strict=True) if side == "train"}
    tested = [
        (place, form) for place, (form, side) in enumerate(zip(alike.first, sides, strict=True)) if side == "test"
    ]
    return [place for place, form in tested if not learned.isdisjoint((form, *near[form]))]


class _Known:
    """The parts of the rows so far, by what keeps rows together."""

    def __init__(self, alike: Alike, keys: list[str | None]):
        self.forms, self.near, self.keys = alike.first, _both_ways(alike, 0.0), keys
        self.at_form: dict[int, str] = {}
        self.at_key: dict[str | None, str] = {}

    def sides(self, at: int) -> set[str]:
        """The parts of the earlier rows that a row belongs to: at most one part a form, and one a key."""
        form = self.forms[at]
        found = {self.at_form.get(each) for each in (form, *self.near[form])} | {self.at_key.get(self.keys[at])}
        return {side for side in found if side is not None}

    def place(self, at: int, side: str) -> None:
        self.at_form[self.forms[at]] = side
        if self.keys[at] is not None:
            self.at_key[self.keys[at]] = side


def _both_ways(alike: Alike, threshold: float) -> defaultdict[int, list[int]]:
    near = defaultdict[int, list[int]](list)
    for pair in alike.pairs:
        if pair.similarity >= threshold:
            near[pair.first].append(pair.second)
            near[pair.second].append(pair.first)
    return near


def _keys(rows: Pairs, column: str | None) -> list[str | None]:
    """Each row's value in the column `data.group_by`, as text."""
    if column is None:
        return [None] * len(rows)
    for row, _ in rows:
        if column not in row.value:
            what = f"has no column `{column}`, which data.group_by names"
            raise DataError(what, where=row.where, hint=f"it has {named(row)}")
    return [_written(row.value[column]) for row, _ in rows]


def _stratum(example: Example, pattern: str | None) -> str | None:
    answer = answer_text(example)
    if pattern is not None:
        return label_in(answer, pattern)
    return answer.strip().split("\n")[0].strip() if answer is not None else None


def _drawn(chance: float, shares: dict[str, float], placed: Counter[str], counts: Counter[str]) -> str:
    """The part of a new group: a random draw with feedback, so that a part that is ahead waits for the others."""
    for name, share in shares.items():
        behind = sum(share * each.total() - each[name] for each in (placed, counts))
        wanted = (share if counts else 0.0) + GAIN * behind
        if chance < wanted:
            return name
        chance -= max(0.0, wanted)
    return "train"


def _chance(seed: int, value: object) -> float:
    """A number from 0 to 1, the same for the same seed and value."""
    digest = hashlib.sha256(f"{seed}\n{_written(value)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _written(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _too_few(rows: Pairs, groups: int, parts: list[str]) -> DataError:
    return DataError(
        f"{_counted(len(rows), 'row')} in {_counted(groups, 'group')} that must stay together: too few for "
        + ", ".join(parts),
        where=rows[0][0].file if rows else None,
        hint="add rows that ask something else, or bring {train,valid,test}.jsonl of your own",
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

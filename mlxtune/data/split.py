"""One set of rows -> train, valid and test, with nothing learned from one side to be met on the other.

Knows which rows belong together and which label they have, not what they are for.
"""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass

from mlxtune.data.files import Row
from mlxtune.data.formats import Example, answer_text, prompt_text
from mlxtune.data.labels import find_labels
from mlxtune.data.similar import connected, groups
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

Pairs = list[tuple[Row, Example]]
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that stay together: their places, their most frequent label, and a key that shuffles by the seed."""

    places: tuple[int, ...]
    label: str | None
    key: str

    @property
    def size(self) -> int:
        return len(self.places)


def split(rows: Pairs, data: DataRecipe, seed: int, label: str | None) -> dict[str, Pairs]:
    """The rows as `train`, `valid` and `test`, each in file order.

    Rows stay on one side if they have equal values in the column `data.group_by`, or equal or near-duplicate prompts
    (see `similar`). `data.test` and `data.valid` are met as closely as whole groups allow; a share of 0 gives an empty
    split. Where answers have labels (see `find_labels`) each split gets every label that has enough groups, then each
    label's share of the rows. The result depends on the rows and the seed, not on the order of the rows.

    Raises DataError if there are fewer groups than splits, or a row lacks the column `data.group_by`.
    """
    members = _groups(rows, data, seed, label)
    shares = {name: share for name, share in (("test", data.test), ("valid", data.valid)) if share > 0}
    if len(members) <= len(shares):
        raise DataError(
            f"{_counted(len(rows), 'row')} in {_counted(len(members), 'group')} that must stay together: too few for "
            + ", ".join(name for name in PARTS if name == "train" or name in shares),
            where=rows[0][0].file if rows else None,
            hint="add rows that ask something else, or bring {train,valid,test}.jsonl of your own",
        )
    strata = _strata(members, parts=1 + len(shares))
    sizes = [sum(group.size for group in stratum) for stratum in strata]
    side = ["train"] * len(rows)
    for number, (name, share) in enumerate(shares.items()):
        for group in _take(strata, [share * size for size in sizes], parts_left=len(shares) - number):
            for place in group.places:
                side[place] = name
    return {name: [pair for pair, at in zip(rows, side, strict=True) if at == name] for name in PARTS}


def _groups(rows: Pairs, data: DataRecipe, seed: int, label: str | None) -> list[_Group]:
    """The groups of rows in the order of their keys."""
    # a row that asks nothing is compared by what it says
    alike = groups([prompt_text(example).strip() or answer_text(example) or "" for _, example in rows])
    links = list(enumerate(alike))
    if data.group_by is not None:
        first: dict[str, int] = {}
        for place, (row, _) in enumerate(rows):
            if data.group_by not in row.value:
                raise DataError(f"has no column `{data.group_by}`, which data.group_by names", where=row.where)
            links.append((first.setdefault(json.dumps(row.value[data.group_by], sort_keys=True), place), place))
    together: dict[int, list[int]] = defaultdict(list)
    for place, group in enumerate(connected(len(rows), links)):
        together[group].append(place)
    labels = find_labels([answer_text(example) for _, example in rows], label) or [None] * len(rows)
    found = []
    for places in together.values():
        content = min(json.dumps(rows[place][0].value, sort_keys=True) for place in places)
        key = hashlib.sha256(f"{seed}\n{content}".encode()).hexdigest()
        counts = Counter(labels[place] for place in places)
        most = min(counts, key=lambda each: (-counts[each], each is None, each or ""))
        found.append(_Group(tuple(places), most, key))
    return sorted(found, key=lambda group: group.key)


def _strata(members: list[_Group], parts: int) -> list[list[_Group]]:
    """Groups by label; labels with fewer groups than parts can't be everywhere and share one stratum."""
    by_label: dict[str | None, list[_Group]] = defaultdict(list)
    for group in members:
        by_label[group.label].append(group)
    rare = {each for each, having in by_label.items() if each is None or len(having) < parts}
    strata = [having for each, having in sorted(by_label.items(), key=lambda i: str(i[0])) if each not in rare]
    rest = [group for group in members if group.label in rare]
    return [*strata, rest] if rest else strata


def _take(strata: list[list[_Group]], wanted: list[float], parts_left: int) -> list[_Group]:
    """Takes groups out of the strata for one held-out part, which wants so many rows of each, and returns them.

    Strata that have nothing in the part yet come first; then the one that is furthest behind its share by
    Sainte-Laguë's rule, the least (taken + size / 2) / wanted. Each stratum keeps a group for each of the `parts_left`
    after this one where it can. It ends when no group would bring the part closer to its share of all rows.
    """
    counts = [0] * len(strata)
    chosen: list[_Group] = []
    while True:
        room = 2 * (sum(wanted) - sum(counts)) + 1e-9  # a group up to twice the gap brings the part closer
        behind = [
            (number, group)
            for number, stratum in enumerate(strata)
            if len(stratum) > parts_left
            for group in _fitting(stratum, room, wanted[number] - counts[number])
        ]
        if not behind:
            break
        number, group = min(behind, key=lambda each: _claim(each, counts, wanted))
        strata[number].remove(group)
        counts[number] += group.size
        chosen.append(group)
    if not chosen:  # the share is less than half of any group, but a part that was asked for is not empty
        stratum = max(strata, key=len)
        chosen.append(min(stratum, key=lambda group: (group.size, group.key)))
        stratum.remove(chosen[0])
    return chosen


def _fitting(stratum: list[_Group], room: float, gap: float) -> list[_Group]:
    """At most one group of a stratum: the first that suits its gap, else the smallest; none if that has no room."""
    limit = min(room, 2 * gap + 1e-9)
    found = next((group for group in stratum if group.size <= limit), None)
    if found is None:
        found = min(stratum, key=lambda group: group.size)
    return [found] if found.size <= room else []


def _claim(each: tuple[int, _Group], counts: list[int], wanted: list[float]) -> tuple[bool, float, str]:
    number, group = each
    return counts[number] > 0, (counts[number] + group.size / 2) / wanted[number], group.key


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Plants known trouble into banking77 and counts what the audit finds of it: precision and recall, exact and near.

    python scripts/plant_trouble.py --data FOLDER_WITH_TRAIN_AND_TEST_CSV [--seed 0] [--each 200] [--json]

Planted, each from a row of its own: duplicates and contradictions in train, leaks of train into test. An exact plant is
the row again, half of them in other capitals and with another end; a near plant has one word misspelt, added or
changed for one that means the same. Rows of fewer than four words are left alone. A contradiction gets another label at
random.

banking77 has trouble of its own. The audit first sees the files without the plants; what it reports there of a kind is
known before and counts neither way. After planting, a plant is found if the finding of its kind names it, or names its
source and the plant beside it. A report of two rows that were nearly the same before, or of a plant and a neighbour
that its source had before, follows from the plant and counts neither way; everything else is a false alarm. So
precision says what planting made the audit say wrongly, not whether what it says of banking77 itself is right.
"""

import argparse
import csv
import itertools
import json
import random
import re
import string
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlxtune.data.audit import Finding, audit
from mlxtune.data.audit.entries import read
from mlxtune.data.similar import near_pairs, normalise
from mlxtune.recipe import DataRecipe

DATA = DataRecipe(prompt="{{ text }}", completion="{{ category }}")
KINDS = ("duplicate", "contradiction", "leak")
EVERYTHING = 10**9
FEWEST_WORDS = 4
FILLERS = ("please", "just", "actually", "really", "still", "now", "again", "currently", "also", "then")
# words that can stand for each other in a question to a bank
SAME = (
    "get receive", "help assist", "want need", "buy purchase", "fix solve", "problem issue", "wrong incorrect",
    "charged billed", "quickly fast", "tell inform", "happened occurred", "allowed permitted", "change modify",
    "reason cause", "explain clarify", "begin start", "my the", "a the", "can could", "will would", "is was",
    "should must", "i we", "me us", "this the", "have had", "why how", "trying attempting", "show display",
    "think believe", "see find", "take require", "showing appearing", "got received", "made did",
)  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A row of trouble: the split and number that it gets, and the row of train that it is made from."""

    kind: str
    near: bool
    text: str
    label: str
    source: int


Origin = tuple[str, int] | Planted  # split and number, or what was planted
Row = tuple[str, str, Origin]  # text, label, and where it comes from


def changed_spelling(text: str, rng: random.Random) -> str:
    """The text as somebody else might type it: the same after normalising."""
    end = rng.choice(["", ".", "?", "!", " ?"])
    return rng.choice([str.lower, str.upper, str.capitalize])(text.rstrip(string.punctuation + " ")) + end


def misspelt(words: list[str], rng: random.Random) -> list[str] | None:
    """One letter of a word of four letters or more lost, doubled, swapped with the next, or wrong."""
    places = [place for place, word in enumerate(words) if re.fullmatch("[A-Za-z]{4,}", word)]
    if not places:
        return None
    place = rng.choice(places)
    word, at = words[place], rng.randrange(1, len(words[place]) - 1)
    new = rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[: at + 1] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + rng.choice(string.ascii_lowercase) + word[at + 1 :],
        ]
    )
    return [*words[:place], new, *words[place + 1 :]]


def added(words: list[str], rng: random.Random) -> list[str] | None:
    place = rng.randrange(len(words) + 1)
    return [*words[:place], rng.choice(FILLERS), *words[place:]]


def replaced(words: list[str], rng: random.Random) -> list[str] | None:
    """One word for another that means the same here."""
    pairs = [each.split() for each in SAME]
    pairs += [pair[::-1] for pair in pairs]
    choices = [(place, new) for place, word in enumerate(words) for old, new in pairs if word.lower() == old]
    if not choices:
        return None
    place, new = rng.choice(choices)
    return [*words[:place], new, *words[place + 1 :]]


EDITS: tuple[Callable[[list[str], random.Random], list[str] | None], ...] = (misspelt, added, replaced)


def near_text(text: str, number: int, taken: set[str], rng: random.Random) -> str | None:
    """The text with one word edited, the edits in turn; None where this gives no new text."""
    for edit in (*EDITS[number % len(EDITS) :], *EDITS[: number % len(EDITS)]):
        words = edit(text.split(), rng)
        if words is not None and normalise(" ".join(words)) not in taken:
            return " ".join(words)
    return None


def plant(train: list[tuple[str, str]], each: int, rng: random.Random) -> list[Planted]:
    """`each` plants of every kind, exact and near, no two from one row."""
    labels = sorted({label for _, label in train})
    taken = {normalise(text) for text, _ in train}
    sources = [place for place, (text, _) in enumerate(train) if len(text.split()) >= FEWEST_WORDS]
    rng.shuffle(sources)
    found: list[Planted] = []
    for kind in KINDS:
        for near in (False, True):
            for number in range(each):
                text = None
                while text is None:
                    source = sources.pop()
                    text, label = train[source]
                    if near:
                        text = near_text(text, number, taken, rng)
                    elif number % 2:
                        text = changed_spelling(text, rng)
                if kind == "contradiction":
                    label = rng.choice([other for other in labels if other != label])
                taken.add(normalise(text))
                found.append(Planted(kind, near, text, label, source))
    return found


def write(folder: Path, splits: dict[str, list[Row]]) -> dict[str, Row]:
    """Writes the splits as CSV; gives each row by its place, `file:line`."""
    folder.mkdir()
    places: dict[str, Row] = {}
    for split, rows in splits.items():
        path = folder / f"{split}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows([" ".join(text.split()), label] for text, label, _ in rows)  # one line a row
        places |= {f"{path}:{line}": row for line, row in enumerate(rows, start=2)}
    return places


def report(folder: Path) -> tuple[Finding, ...]:
    files = {split: folder / f"{split}.csv" for split in ("train", "test")}
    return audit(files, DATA, None, places=EVERYTHING).findings


def named(findings: tuple[Finding, ...], kind: str, near: bool) -> dict[str, str]:
    """The places that findings of a kind name, each with the place that its note names."""
    if kind == "duplicate":
        chosen = [each for each in findings if each.kind == ("near_duplicate" if near else "duplicate")]
    else:
        chosen = [each for each in findings if each.kind == kind and each.severity == "warning"]
    pairs = [pair for each in chosen for pair in zip(each.where, each.notes, strict=True)]
    if kind == "leak":
        pairs = [(where, note) for where, note in pairs if note.startswith("like " if near else "as ")]
    if kind == "contradiction":
        pairs = [pair for each in chosen if each.detail.startswith("nearly") == near
                 for pair in zip(each.where, each.notes, strict=True)]  # fmt: skip
    return {where: re.search(r"\S+\.csv:\d+", note)[0] for where, note in pairs}


def pairs_before(folder: Path) -> set[frozenset[str]]:
    """The places of all pairs of rows whose prompts are the same or nearly, before anything is planted."""
    files = {split: folder / f"{split}.csv" for split in ("train", "test")}
    entries = read(files, DATA, None).entries
    having: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        having[entry.key].append(entry.row.where)
    found = {frozenset(pair) for same in having.values() for pair in itertools.combinations(same, 2)}
    keys = list(having)
    for pair in near_pairs(keys):
        found |= {frozenset(ends) for ends in itertools.product(having[keys[pair.first]], having[keys[pair.second]])}
    return found


def measure(data: Path, seed: int, each: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Precision and recall by kind, and the false alarms and misses as texts."""
    rng = random.Random(seed)
    splits: dict[str, list[Row]] = {}
    for split in ("train", "test"):
        with (data / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
        splits[split] = [(text, label, (split, number)) for number, (text, label) in enumerate(rows)]
    planted = plant([(text, label) for text, label, _ in splits["train"]], each, rng)
    with tempfile.TemporaryDirectory() as name:
        before, after = Path(name, "before"), Path(name, "after")
        old = write(before, splits)
        known, natural = report(before), pairs_before(before)
        for row in planted:
            rows = splits["test" if row.kind == "leak" else "train"]
            rows.insert(rng.randrange(len(rows) + 1), (row.text, row.label, row))
        new = write(after, splits)
        found = report(after)
    near_before = {frozenset(old[where][2] for where in pair) for pair in natural}
    figures: dict[str, dict[str, float]] = {}
    shown: list[str] = []
    for kind, near in itertools.product(KINDS, (False, True)):
        wanted = [row for row in planted if (row.kind, row.near) == (kind, near)]
        was = {old[where][2] for where in named(known, kind, near)}
        hits: set[int] = set()
        counts = {"right": 0, "follow": 0, "false": 0}
        for where, other in named(found, kind, near).items():
            verdict, hit = judged(new[where][2], new[other][2], wanted, was, near_before)
            hits |= hit
            counts[verdict] = counts.get(verdict, 0) + 1
            if verdict == "false":
                shown.append(f"false {kind} near={near}: {new[where][:2]} | {new[other][:2]}")
        shown += [f"missed {kind} near={near}: {row}" for row in wanted if id(row) not in hits]
        figures[f"{kind}, {'near' if near else 'exact'}"] = {
            "planted": len(wanted),
            "found": len(hits),
            "false": counts["false"],
            "follow": counts["follow"],
            "before": len(was),
            "precision": counts["right"] / max(1, counts["right"] + counts["false"]),
            "recall": len(hits) / len(wanted),
        }
    return figures, shown


def judged(
    row: Origin, other: Origin, wanted: list[Planted], was: set[Origin], near_before: set[frozenset[Origin]]
) -> tuple[str, set[int]]:
    """Whether a report is `right`, was `known`, is to `follow` from a plant, or is `false`; and the plants it finds."""
    plants = [end for end in (row, other) if isinstance(end, Planted) and any(end is each for each in wanted)]
    if row in plants or (plants and source(row) == source(other)):
        return "right", {id(plants[0])}
    if row in was:
        return "known", set()
    ends = frozenset((source(row), source(other)))
    return ("follow" if len(ends) == 1 or ends in near_before else "false"), set()


def source(origin: Origin) -> Origin:
    return ("train", origin.source) if isinstance(origin, Planted) else origin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77's train.csv and test.csv")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is planted and where")
    parser.add_argument("--each", type=int, default=200, help="plants of each kind, exact and near")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print up to N false alarms and misses")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    figures, shown = measure(args.data, args.seed, args.each)
    for line in random.Random(args.seed).sample(shown, min(args.show, len(shown))):
        print(line, file=sys.stderr)
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{'':<24}{'planted':>9}{'found':>9}{'false':>9}{'follow':>9}{'before':>9}{'precision':>11}{'recall':>9}")
    for name, row in figures.items():
        counts = "".join(f"{row[key]:>9}" for key in ("planted", "found", "false", "follow", "before"))
        print(f"{name:<24}{counts}{row['precision']:>11.3f}{row['recall']:>9.3f}")


if __name__ == "__main__":
    main()

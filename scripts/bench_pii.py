"""Precision and recall of the search for personal data, per kind, on texts whose personal data is labelled.

    python scripts/bench_pii.py --data synth_dataset_v2.json [--clean FILE ...] [--json]

`--data` is a file of presidio-research: a list of `full_text` and `spans` with `entity_type`, `start_position` and
`end_position`. A labelled span counts as found if a finding of the same kind covers at least half of it; a finding is
right if it covers at least half of a labelled span of its kind. Where presidio-analyzer is installed, its recognisers
get the same spans, at any score: over an installed English spaCy model, or over a blank pipeline, where only its
patterns can work.
`--clean` are files of rows without personal data (text lines, JSONL, CSV, TSV, or JSON lists): there every finding is
taken for false, and the first ones are printed, so that a reader can judge.
"""

import argparse
import csv
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlxtune.data import pii

# the set's kind: ours, presidio's
KINDS = {
    "EMAIL_ADDRESS": ("email", "EMAIL_ADDRESS"),
    "CREDIT_CARD": ("card", "CREDIT_CARD"),
    "IBAN_CODE": ("iban", "IBAN_CODE"),
    "PHONE_NUMBER": ("phone", "PHONE_NUMBER"),
    "IP_ADDRESS": ("ip", "IP_ADDRESS"),
    "US_SSN": ("national_id", "US_SSN"),
    "US_DRIVER_LICENSE": (None, "US_DRIVER_LICENSE"),
    "PERSON": (None, "PERSON"),
    "GPE": (None, "LOCATION"),
    "NRP": (None, "NRP"),
}
SHOWN = 20  # false findings on clean text that are printed

Span = tuple[str, int, int]
Search = Callable[[str], list[Span]]


@dataclass(frozen=True)
class Kind:
    """What a search made of one kind; `precision` and `recall` are None where nothing was found, or labelled."""

    kind: str
    labelled: int
    hit: int
    found: int
    right: int
    precision: float | None
    recall: float | None


def core(text: str) -> list[Span]:
    return [(each.entity, each.start, each.end) for each in pii.find(text)]


def presidio() -> tuple[str, Search] | None:
    """presidio's search and what it runs over; None where it is not installed."""
    try:
        import spacy

        from mlxtune.data.pii import presidio as deep

        models = [name for name in deep.MODELS if spacy.util.is_package(name)]
        pipeline = spacy.load(models[0]) if models else spacy.blank("en")
        engine = deep.engine(pipeline)
    except ImportError:
        return None
    asked = sorted({theirs for _, theirs in KINDS.values()})

    def search(text: str) -> list[Span]:
        return [(each.entity_type, each.start, each.end) for each in engine.analyze(text, "en", entities=asked)]

    return f"presidio over {models[0] if models else 'a blank spaCy pipeline'}", search


def covers(finding: Span, label: Span) -> bool:
    """The same kind, and at least half of the label."""
    kind, start, end = label
    return finding[0] == kind and 2 * (min(finding[2], end) - max(finding[1], start)) >= end - start


def measure(rows: list[dict[str, Any]], search: Search, column: int) -> tuple[list[Kind], float]:
    """The kinds that a search knows, and its seconds per 1,000 texts. `column` is the search's in KINDS."""
    labelled, hit, found, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    names = {kind: names[column] for kind, names in KINDS.items() if names[column]}
    kinds = {name: kind for kind, name in names.items()}
    seconds = 0.0
    for row in rows:
        labels = [
            (names[span["entity_type"]], span["start_position"], span["end_position"])
            for span in row["spans"]
            if span["entity_type"] in names
        ]
        started = time.perf_counter()
        findings = [each for each in search(row["full_text"]) if each[0] in kinds]
        seconds += time.perf_counter() - started
        labelled.update(kinds[label[0]] for label in labels)
        hit.update(kinds[label[0]] for label in labels if any(covers(each, label) for each in findings))
        found.update(kinds[each[0]] for each in findings)
        right.update(kinds[each[0]] for each in findings if any(covers(each, label) for label in labels))
    scores = [
        Kind(
            kind,
            labelled[kind],
            hit[kind],
            found[kind],
            right[kind],
            right[kind] / found[kind] if found[kind] else None,
            hit[kind] / labelled[kind] if labelled[kind] else None,
        )
        for kind in names
    ]
    return scores, 1000 * seconds / len(rows)


def rows_of(path: Path) -> Iterator[list[str]]:
    """The rows of a clean file, each as its strings."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix in (".csv", ".tsv"):
            yield from csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        elif path.suffix == ".json":
            yield from items(json.load(file))
        elif path.suffix == ".jsonl":
            yield from (list(strings(json.loads(line))) for line in file)
        else:
            yield from ([line] for line in file if line.strip())


def items(value: object) -> Iterator[list[str]]:
    """The items of a JSON list, or of each list in an object, as the strings in them."""
    if isinstance(value, dict):
        for each in value.values():
            yield from items(each)
    elif isinstance(value, list):
        yield from (list(strings(each)) for each in value)


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def clean(path: Path, search: Search) -> dict[str, Any]:
    """The findings on a clean file, per 1,000 rows, and the time."""
    rows = list(rows_of(path))
    started = time.perf_counter()
    findings = [(text, each) for row in rows for text in row for each in search(text)]
    seconds = time.perf_counter() - started
    return {
        "file": str(path),
        "rows": len(rows),
        "findings": len(findings),
        "per_1000_rows": 1000 * len(findings) / len(rows) if rows else None,
        "seconds_per_1000_rows": 1000 * seconds / len(rows) if rows else None,
        "found": [[kind, text[start:end]] for text, (kind, start, end) in findings[:SHOWN]],
    }


def show(result: dict[str, Any]) -> None:
    def share(value: float | None) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>9}"

    print(f"{result['search']}: {result['seconds_per_1000_texts']:.2f} s per 1,000 texts")
    print(f"  {'kind':<18} {'precision':>9} {'right/found':>11} {'recall':>9} {'hit/labelled':>12}")
    for kind in result["kinds"]:
        right, hit = f"{kind['right']}/{kind['found']}", f"{kind['hit']}/{kind['labelled']}"
        print(f"  {kind['kind']:<18} {share(kind['precision'])} {right:>11} {share(kind['recall'])} {hit:>12}")
    for each in result["clean"]:
        rate, seconds = each["per_1000_rows"], each["seconds_per_1000_rows"]
        print(f"  clean {each['file']}: {each['findings']} findings in {each['rows']:,} rows", end="")
        print("" if rate is None else f", {rate:.3f} per 1,000, {seconds:.3f} s per 1,000")
        for kind, value in each["found"]:
            print(f"    {kind}: {value!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clean", type=Path, nargs="*", default=[])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = json.loads(options.data.read_text(encoding="utf-8"))
    searches: list[tuple[str, Search, int]] = [("core", core, 0)]
    if (installed := presidio()) is not None:
        searches.append((*installed, 1))
    else:
        print("presidio-analyzer is not installed: the core alone", file=sys.stderr)
    results = []
    for name, search, column in searches:
        kinds, seconds = measure(rows, search, column)
        found = [clean(path, search) for path in options.clean]
        kept = [asdict(kind) for kind in kinds]
        results.append({"search": name, "seconds_per_1000_texts": seconds, "kinds": kept, "clean": found})
    if options.json:
        print(json.dumps({"texts": len(rows), "searches": results}, indent=2, ensure_ascii=False))
        return
    print(f"{len(rows):,} texts; a span is found if a finding of its kind covers at least half of it")
    for result in results:
        show(result)


if __name__ == "__main__":
    main()

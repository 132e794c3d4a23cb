"""Whether the scores and tables of a run's evaluations follow from their predictions. Knows files, not models."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxtune.errors import DataError
from mlxtune.evaluation import predictions, tally
from mlxtune.evaluation.labelset import label_of
from mlxtune.evaluation.predictions import Prediction
from mlxtune.metrics.exact_match import is_exact
from mlxtune.recipe import EvaluateRecipe
from mlxtune.report import reading
from mlxtune.report.score import Score
from mlxtune.rundir import RunDir
from mlxtune.verification.figures import Verified

Tallied = tuple[list[Score], dict[str, Any]]


class Predictions:
    """The predictions of files, and what follows from them. Files that are equal are read and scored once.

    `on_bytes` is told of each file's bytes in two parts: when it has been read, and when it has been scored.
    """

    def __init__(self, on_bytes: Callable[[int], None] = lambda size: None):
        self._on_bytes = on_bytes
        self._digests: dict[Path, tuple[bytes, int]] = {}
        self._read: dict[bytes, list[Prediction]] = {}
        self._tallied: dict[tuple[Any, ...], Tallied] = {}
        self._marked: set[tuple[Any, ...]] = set()

    def read(self, path: Path, *, scored: bool = True) -> list[Prediction]:
        """The predictions of a file, which will be `scored` or not.

        Raises DataError for none; what else is raised as in `predictions.read`.
        """
        digest, size = self._digest(path)
        if digest not in self._read:
            self._read[digest] = predictions.read(path)
        self._on_bytes(size // 2 if scored else size)
        if not self._read[digest]:
            raise DataError("is empty", where=path, hint="evaluate again")
        return self._read[digest]

    def tallied(self, path: Path, settings: EvaluateRecipe, labels: Sequence[str], schema: object) -> Tallied:
        """The scores and tables of a file's predictions, which has been read. Raises what `tally.tally` raises."""
        digest, size = self._digest(path)
        key = (digest, repr(settings), tuple(labels))
        if key not in self._tallied:
            self._tallied[key] = tally.tally(tally.Rows(self._read[digest], settings, labels, schema))
        self._on_bytes(size - size // 2)
        return self._tallied[key]

    def check_marks(self, run: RunDir, path: Path, settings: EvaluateRecipe, result: Verified) -> None:
        """Each prediction of a file, which has been read, is right where it says so."""
        digest, _ = self._digest(path)
        key = (digest, settings.label)
        if key in self._marked:
            return
        self._marked.add(key)
        name = path.relative_to(run.root).as_posix()
        for number, each in enumerate(self._read[digest], start=1):
            _check_marks(f"{name}:{number}", each, settings, result)

    def _digest(self, path: Path) -> tuple[bytes, int]:
        """What a file holds, as a hash, and its bytes; of a file that cannot be read its name, and none."""
        if path not in self._digests:
            try:
                content = path.read_bytes()
            except OSError:  # which `predictions.read` tells
                return str(path).encode(), 0
            self._digests[path] = hashlib.sha256(content).digest(), len(content)
        return self._digests[path]


def check(
    run: RunDir, name: str, settings: EvaluateRecipe, schema: object, known: Predictions, result: Verified
) -> None:
    """Every score and table of an evaluation is what its predictions give. Raises InputError for unreadable files."""
    stated = reading.evaluation_of(run, name)
    if stated is None:
        return
    file, path = f"eval/{name}.json", run.predictions(name)
    found = known.read(path)
    result.predictions += len(found)
    result.hold(file, "n", stated["n"], len(found))
    known.check_marks(run, path, settings, result)
    scores, tables = known.tallied(path, settings, labels(stated, settings), schema)
    again = {"scores": [score.to_dict() for score in scores], "tables": tables}
    result.compare(file, {"scores": stated["scores"], "tables": stated["tables"]}, again)
    check_lengths(file, "cost", stated["cost"], found, result)


def check_lengths(file: str, key: str, cost: Mapping[str, Any], found: Sequence[Prediction], result: Verified) -> None:
    """The mean tokens of prompts and answers are those of the rows."""
    for name in ("prompt_tokens", "answer_tokens"):
        known = [count for each in found if (count := getattr(each, name)) is not None]
        mean = sum(known) / len(known) if known else None
        if cost.get(name) is not None or mean is not None:
            result.hold(file, f"{key}.{name}", cost.get(name), mean)


def labels(evaluation: Mapping[str, Any] | None, settings: EvaluateRecipe) -> Sequence[str]:
    """The set of labels. It is that of the training rows: its names are taken as stated, what was given is counted."""
    table = (evaluation["tables"] if evaluation else {}).get("confusion") or {}
    found: Sequence[str] = table.get("labels") or settings.labels
    return found


def _check_marks(where: str, each: Prediction, settings: EvaluateRecipe, result: Verified) -> None:
    """A prediction's answer is right where it says so."""
    if each.answer is None or each.expected is None:
        return
    result.hold(where, "exact", each.exact, is_exact(each.answer, each.expected))
    if each.label_expected is not None:
        label, expected = label_of(each.answer, settings.label), label_of(each.expected, settings.label)
        result.hold(where, "label", each.label, label)
        result.hold(where, "label_expected", each.label_expected, expected)
        result.hold(where, "right", each.right, label == expected)

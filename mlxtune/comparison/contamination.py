"""Test rows found near training rows, and the scores without them. Knows texts and predictions, not models.

Near is what `data/similar` calls so: letters in common, not meaning. The split keeps such rows on one side; files that
a user brings may not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxtune.comparison import contrast
from mlxtune.comparison.contrast import Prediction
from mlxtune.data.files import Row
from mlxtune.data.formats import Example
from mlxtune.data.similar import neighbours
from mlxtune.data.split import compared

Rows = Sequence[tuple[Row, Example]]
MOST_NAMED = 100


@dataclass(frozen=True, slots=True)
class Near:
    """A test row, the training row that is most like it, and their similarity between 0 and 1."""

    test: str
    train: str
    similarity: float


def near(train: Rows, test: Rows) -> list[Near]:
    """The test rows that are equal or near to a training row, in their order, each with the nearest one."""
    if not train or not test:
        return []
    alike = neighbours(compared([*train, *test]))
    learned: dict[int, int] = {}  # a compared form -> the first training row of it
    for place in range(len(train)):
        learned.setdefault(alike.first[place], place)
    best: dict[int, tuple[float, int]] = {form: (1.0, place) for form, place in learned.items()}
    for pair in alike.pairs:
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if other in learned and pair.similarity > best.get(one, (0.0, 0))[0]:
                best[one] = (pair.similarity, learned[other])
    found = []
    for place, (row, _) in enumerate(test, start=len(train)):
        if alike.first[place] in best:
            similarity, nearest = best[alike.first[place]]
            found.append(Near(row.where, train[nearest][0].where, similarity))
    return found


def measured(train: Rows, test: Rows, predictions: Mapping[str, Sequence[Prediction]]) -> dict[str, Any] | None:
    """The test rows near training rows, and every candidate's scores without them; None without training rows."""
    if not train:
        return None
    found = near(train, test)
    places = [each.test for each in found]
    rest = {name: contrast.without(each, places) for name, each in predictions.items()} if found else {}
    return {
        "count": len(found),
        "near": [asdict(each) for each in found[:MOST_NAMED]],
        "without": [
            {"name": name, "scores": [score.to_dict() for score in contrast.rescored(each)]}
            for name, each in rest.items()
        ],
    }

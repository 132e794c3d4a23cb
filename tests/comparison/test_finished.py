"""A run folder as it is compared on: its base, rows, groups and labels, and what is no run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxtune import recipe
from mlxtune.comparison.finished import open_run
from mlxtune.errors import InputError
from mlxtune.rundir import RunDir

ROWS = [
    {"prompt": f"question {row}", "completion": "yes" if row % 2 else "no", "who": f"p{row // 4}"} for row in range(40)
]

Make = Callable[..., tuple[RunDir, recipe.Recipe]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run folder with a recipe and rows, of which those of the test split may be others."""

    def make(test: list[dict[str, Any]] = ROWS[:8], **settings: Any) -> tuple[RunDir, recipe.Recipe]:
        run = RunDir(tmp_path / "run")
        run.data.mkdir(parents=True)
        for name, rows in (("train", ROWS), ("valid", ROWS[:2]), ("test", test)):
            (run.data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = recipe.build({"model": "tiny", **settings}, where="test")
        run.recipe.write_text(recipe.dump(made))
        return run, made

    return make


def test_rows_base_and_samples(make: Make, tiny: Path) -> None:
    finished = open_run(*make())
    assert {name: len(rows) for name, rows in finished.rows.items()} == {"train": 40, "valid": 2, "test": 8}
    assert finished.base == tiny
    assert (finished.asked.context, finished.asked.room, finished.limit.tokens) == (512, 512, 512)
    samples = finished.samples("test")
    assert [each.where for each in samples] == [f"{finished.run.data}/test.jsonl:{line}" for line in range(1, 9)]
    assert [each.answer for each in samples] == ["no", "yes"] * 4


def test_the_quantized_base_is_the_base(make: Make, tiny: Path) -> None:
    run, made = make()
    run.base.symlink_to(tiny)
    assert open_run(run, made).base == run.base


def test_a_base_that_the_caller_has(make: Make, stories: Path) -> None:
    run, made = make()
    finished = open_run(run, replace(made, model="not/there"), stories)
    assert finished.base == stories
    assert finished.asked.template is not None  # it has none of its own


def test_the_groups_that_the_recipe_names(make: Make) -> None:
    finished = open_run(*make(data={"group_by": "who"}))
    places = [f"{finished.run.data}/test.jsonl:{line}" for line in range(1, 9)]
    assert finished.groups("test") == dict(zip(places, ["p0"] * 4 + ["p1"] * 4, strict=True))
    assert open_run(finished.run, replace(finished.recipe, data=recipe.DataRecipe())).groups("test") == {}


def test_the_labels_of_the_training_rows(make: Make) -> None:
    labels = open_run(*make()).label_set()
    assert labels is not None
    assert labels.labels == ("no", "yes")


def test_no_run(make: Make, tmp_path: Path) -> None:
    made = recipe.build({"model": "tiny"}, where="test")
    with pytest.raises(InputError, match="holds no run"):
        open_run(RunDir(tmp_path), made)
    with pytest.raises(InputError, match="has no test rows"):
        open_run(*make([]))

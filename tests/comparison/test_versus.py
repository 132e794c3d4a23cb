import json
import shutil
from pathlib import Path

import pytest

from mlxtune.comparison.versus import versus
from mlxtune.errors import InputError
from mlxtune.metrics.significance import mcnemar
from mlxtune.rundir import RunDir
from tests import reported


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Two runs on the same rows: the second's fused model has 10 more of the 96 rows wrong."""
    first, second = (reported.make_run(tmp_path / name) for name in ("a", "b"))
    reported.put_evaluation(second, "fused", reported.wrong_every(5), 0.4)
    return first, second


def test_the_fused_models_are_compared_row_by_row(runs: tuple[RunDir, RunDir]) -> None:
    found = versus(*runs)
    assert (found.column, found.metric, found.common) == ("fused", "accuracy", 96)
    # wrong are the rows 0, 10, ... in the first, and 0, 5, 10, ... in the second
    assert found.flips is not None and (found.flips["fixed"], found.flips["broken"]) == (0, 10)
    assert found.difference is not None
    assert found.difference["value"] == pytest.approx(-10 / 96)
    assert found.difference["p"] == mcnemar(0, 10)
    before, after = found.scores["fused"]["accuracy"]
    assert before is not None and after is not None
    assert (before.value, after.value) == (86 / 96, 76 / 96)
    assert found.recipe == []


def test_rows_are_the_same_by_what_they_ask_and_not_by_their_place(runs: tuple[RunDir, RunDir]) -> None:
    path = runs[1].predictions("fused")
    lines = [json.loads(line) for line in path.read_text().splitlines()][:50]
    moved = [{**each, "where": f"elsewhere.jsonl:{number}"} for number, each in enumerate(reversed(lines))]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in moved))
    found = versus(*runs)
    assert found.common == 50 and found.flips is not None and found.flips["broken"] == 5


def test_other_rows_are_not_compared(runs: tuple[RunDir, RunDir]) -> None:
    path = runs[1].predictions("fused")
    lines = [{**json.loads(line), "prompt": "another"} for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    found = versus(*runs)
    assert (found.common, found.difference, found.flips) == (0, None, None)


def test_a_run_that_was_not_fused_is_compared_by_its_tuned_model(runs: tuple[RunDir, RunDir]) -> None:
    runs[0].evaluation("fused").unlink()
    found = versus(*runs)
    assert found.column == "tuned" and found.flips is not None
    assert (found.flips["fixed"], found.flips["broken"]) == (0, 0)
    assert found.scores["fused"]["accuracy"][0] is None


def test_half_a_run_has_nothing_to_compare(runs: tuple[RunDir, RunDir]) -> None:
    shutil.rmtree(runs[0].root / "eval")
    found = versus(*runs)
    assert (found.column, found.metric, found.common, found.difference) == (None, None, 0, None)


def test_a_folder_without_a_run_is_refused(runs: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        versus(runs[0], RunDir(tmp_path / "none"))

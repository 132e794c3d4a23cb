"""What a comparison holds beside its candidates' scores: each altered figure and line is named, and no file is too odd.

The altered figures and lines are of a run whose other files are as they were, so that nothing else is named.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxtune import recipe
from mlxtune.comparison import evidence, learning_curve
from mlxtune.data import load
from mlxtune.export import card
from mlxtune.report import build
from mlxtune.rundir import RunDir, read_json
from mlxtune.verification import comparison
from mlxtune.verification.evaluations import Predictions
from mlxtune.verification.figures import Verified
from mlxtune.verify import verify
from tests import reported
from tests.reported import told

FILE = "compare/compare.json"
LINES = ("forgetting", "choices", "judged", "since", "curve/25", "curve/50", "curve/100")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = reported.make_run(tmp_path_factory.mktemp("finished"))
    reported.add_comparison(made)
    reported.add_evidence(made)
    build.write(made)
    return made.root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy of the finished run, to be spoiled."""
    return RunDir(Path(shutil.copytree(finished, tmp_path / "tickets")))


def checked(run: RunDir) -> Verified:
    """The comparison alone, without the hashes and the report."""
    result = Verified()
    with result.reading(run, run.compare / "compare.json"):
        comparison.check(run, recipe.load(run.recipe), Predictions(), result)
    return result


def at(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value[key]
    return value


def test_an_untouched_run_is_as_stated(run: RunDir) -> None:
    found = verify(run)
    assert (found.differences, found.unchecked) == ([], [])
    assert found.predictions == 96 * (3 + 3 + 3)  # evaluations, candidates, sizes of the learning curve


@pytest.mark.parametrize(
    ("keys", "stated"),
    [
        (("contamination", "count"), 2),
        (("contamination", "near", 0, "similarity"), 0.5),
        (("contamination", "near", 0, "train"), "data/train.jsonl:18"),
        (("contamination", "without", 2, "scores", 0, "value"), 0.125),
        (("forgetting", "base_loss"), 2.3),
        (("forgetting", "tuned_loss"), 2.3),
        (("forgetting", "kl"), 0.3),
        (("forgetting", "kl_error"), 0.3),
        (("forgetting", "tokens"), 4097),
        (("forgetting", "budget"), 0.9),
        (("forgetting", "choices", "n"), 31),
        (("forgetting", "choices", "tuned", "value"), 0.75),
        (("forgetting", "choices", "base", "ci_low"), 0.75),
        (("learning_curve", "points", 1, "rows"), 385),
        (("learning_curve", "points", 0, "value"), 0.125),
        (("learning_curve", "points", 2, "ci_high"), 0.999),
        (("learning_curve", "fit", "value"), 0.999),
        (("learning_curve", "sentence"), "Twice the data would bring nothing."),
        (("judged", "wins"), 33),
        (("judged", "swayed"), 33),
        (("judged", "better"), "fused"),
        (("judged", "judge"), "a person"),
        (("judged", "score", "ci_low"), 0.25),
        (("flips_since", "fixed"), 41),
        (("flips_since", "examples", 0, "before"), "queue: nothing"),
        (("candidates", 2, "cost", "bytes"), 5_500_000),
        (("metric",), "exact_match"),
        (("rows",), 97),
    ],
)
def test_one_altered_figure_is_named(run: RunDir, keys: tuple[Any, ...], stated: Any) -> None:
    path = run.compare / "compare.json"
    value = read_json(path)
    assert at(value, *keys) != stated
    at(value, *keys[:-1])[keys[-1]] = stated
    path.write_text(json.dumps(value))
    found = checked(run)
    first = "tuned.cost" if keys[0] == "candidates" else str(keys[0])
    assert {each.file for each in found.differences} == {FILE}
    assert all(each.key.startswith(first) for each in found.differences)
    assert len(found.differences) == 1


@pytest.mark.parametrize("name", ["forgetting", "learning_curve", "judged", "flips_since", "contamination"])
def test_a_part_that_was_left_out_is_named(run: RunDir, name: str) -> None:
    path = run.compare / "compare.json"
    path.write_text(json.dumps({**read_json(path), name: None}))
    assert any(each.file == FILE and each.key.startswith(name) for each in checked(run).differences)


@pytest.mark.parametrize(
    ("name", "number", "changes", "key"),
    [
        ("forgetting", 0, {"base_nats": 1200.0}, "forgetting.base_loss"),
        ("forgetting", 7, {"tuned_nats": 1200.0}, "forgetting.tuned_loss"),
        ("forgetting", 3, {"kl": 0.5}, "forgetting.kl_error"),
        ("forgetting", 3, {"tokens": 500}, "forgetting.tokens"),
        ("choices", 4, {"tuned": 0}, "forgetting.choices.tuned.value"),
        ("judged", 2, {"verdicts": ["second", "second"]}, "judged.wins"),
        ("since", 1, {"answer": "no", "exact": False, "right": False, "label": None}, "flips_since.fixed"),
        ("curve/50", 1, {"right": False, "label": "outage"}, "learning_curve.points[1].value"),
    ],
)
def test_one_altered_line_is_named(run: RunDir, name: str, number: int, changes: dict[str, Any], key: str) -> None:
    path = evidence.file(run.compare, name)
    lines = path.read_text().splitlines()
    changed = {**json.loads(lines[number]), **changes}
    assert changed != json.loads(lines[number])
    path.write_text("\n".join([*lines[:number], json.dumps(changed), *lines[number + 1 :]]) + "\n")
    assert (FILE, key) in told(checked(run))


def test_a_pair_that_was_not_asked_about_is_named(run: RunDir) -> None:
    path = evidence.file(run.compare, "judged")
    lines = path.read_text().splitlines()
    other = {**json.loads(lines[0]), "where": "data/test.jsonl:500"}
    path.write_text("\n".join([json.dumps(other), *lines[1:]]) + "\n")
    assert ("compare/evidence/judged.jsonl", "where[0]") in told(checked(run))


def test_a_row_of_no_earlier_run_is_named(run: RunDir) -> None:
    path = evidence.file(run.compare, "since")
    path.write_text(path.read_text().replace("Ticket: ", "Ticket. ", 1))
    assert ("compare/evidence/since.jsonl", "rows of this run") in told(checked(run))


def test_an_altered_training_row_is_told_by_what_follows_from_it(run: RunDir) -> None:
    path = run.data / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:16], *lines[17:]]) + "\n")
    found = told(checked(run))
    assert {(FILE, "contamination.count"), (FILE, "learning_curve.points[2].rows")} <= found


SPOILED: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "one line": lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "empty": lambda path: path.write_text(""),
    "no objects": lambda path: path.write_text("[1]\n7\n"),
    "other objects": lambda path: path.write_text('{"a": 1}\n'),
    "deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "folder": lambda path: _is_folder(path),
    "texts": lambda path: _all_are(path, "x"),
    "numbers": lambda path: _all_are(path, 1e308),
    "long numbers": lambda path: _all_are(path, 10**400),
    "negative": lambda path: _all_are(path, -1),
    "nulls": lambda path: _all_are(path, None),
    "not a number": lambda path: _all_are(path, float("nan")),
}


def _is_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _all_are(path: Path, value: Any) -> None:
    first = json.loads(path.read_text().splitlines()[0])
    lines = [dict.fromkeys(first, value), {**first, **{key: value for key, old in first.items() if old != value}}]
    kept = [{**first, key: value} for key in first]
    path.write_text("".join(json.dumps(each) + "\n" for each in [*kept, *lines]))


@pytest.mark.parametrize("how", SPOILED)
def test_no_file_of_lines_is_too_odd(run: RunDir, how: str) -> None:
    """Each is named, by what cannot be read or does not follow from it; nothing is raised."""
    for name in LINES:
        SPOILED[how](evidence.file(run.compare, name))
    found = told(checked(run))
    parts = [("forgetting", "forgetting"), ("judged", "judged"), ("since", "flips_since"), ("curve", "learning_curve")]
    for name, key in parts:
        in_lines = any(file.startswith(f"compare/evidence/{name}") for file, _ in found)
        in_figures = any(file == FILE and each.startswith(key) for file, each in found)
        assert in_lines or in_figures, name


@pytest.mark.parametrize("name", ["forgetting", "choices", "since", "curve/50"])
def test_a_missing_file_of_lines_is_named(run: RunDir, name: str) -> None:
    evidence.file(run.compare, name).unlink()
    found = verify(run)
    assert (f"compare/evidence/{name}.jsonl", "sha256") in told(found)
    parts = {"choices": "forgetting.choices", "since": "flips_since"}
    if name.startswith("curve"):
        assert any(key.startswith("learning_curve.") for _, key in told(found))
    else:
        assert found.unchecked == [f"{FILE} {parts.get(name, name)}"]


def test_what_an_earlier_version_did_not_keep_is_not_checked(run: RunDir) -> None:
    shutil.rmtree(evidence.folder(run.compare))
    path = run.compare / "compare.json"
    value = read_json(path)
    del value["settings"], value["evaluate"]
    path.write_text(json.dumps(value))
    build.write(run)
    found = verify(run)
    assert found.differences == []
    assert found.unchecked == [f"{FILE} {name}" for name in ("forgetting", "judged", "flips_since", "learning_curve")]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda value: value["settings"].update(judge=5), "content"),
        (lambda value: value["settings"].update(unheard_of=5), "content"),
        (lambda value: value["evaluate"].update(label="("), "content"),
        (lambda value: value["evaluate"].update(max_tokens="x"), "content"),
        (lambda value: value["candidates"][2].update(name="../../x"), "content"),
        (lambda value: value["candidates"][2].update(name="nobody"), "content"),
        (lambda value: value["candidates"][2].update(cost=None), "tuned.cost.prompt_tokens"),
        (lambda value: value["candidates"][2].update(kind="x"), "verdict.decision"),
        (lambda value: value["candidates"][2]["difference"].update(p_adjusted=None), "tuned.difference.p_adjusted"),
        (lambda value: value["candidates"][2]["scores"].pop(), "tuned.scores.ece.value"),
        (lambda value: value["candidates"].append(value["candidates"][2]), "candidates"),
        (lambda value: value["candidates"].clear(), "metric"),
    ],
)
def test_no_comparison_is_too_odd(run: RunDir, change: Callable[[Any], Any], key: str | None) -> None:
    path = run.compare / "compare.json"
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value))
    assert key in {each.key for each in checked(run).differences if each.file.startswith("compare/")}


@pytest.mark.parametrize("settings", [{"labels": reported.QUEUES}, {"label": r"queue:\s(\w+)"}, {"label": r"(queue)"}])
def test_a_comparison_is_scored_by_its_own_settings(run: RunDir, settings: dict[str, Any]) -> None:
    """The same labels by other settings than the run's give the same scores, and other labels do not."""
    path = run.compare / "compare.json"
    value = read_json(path)
    value["evaluate"].update(settings)
    path.write_text(json.dumps(value))
    found = told(checked(run))
    assert bool(found) == (settings == {"label": "(queue)"})
    assert not found or ("compare/tuned.jsonl:1", "label") in found


@pytest.mark.parametrize(("labels", "outside"), [([*reported.QUEUES, "rare"], False), (reported.QUEUES, True)])
def test_labels_are_those_that_the_comparison_states(run: RunDir, labels: list[str], outside: bool) -> None:
    """They may hold one that no test row has, and that a model gives."""
    path, lines = run.compare / "compare.json", run.compare / "tuned.jsonl"
    path.write_text(json.dumps({**read_json(path), "labels": labels}))
    assert told(checked(run)) == set()
    first, *rest = lines.read_text().splitlines()
    first = json.dumps({**json.loads(first), "answer": "queue: rare", "label": "rare", "right": False, "exact": False})
    lines.write_text("\n".join([first, *rest]))
    assert ((FILE, "tuned.scores.outside_labels.value") in told(checked(run))) == outside


def test_a_candidate_that_was_evaluated_answers_as_it_did_there(run: RunDir) -> None:
    lines = run.compare / "tuned.jsonl"
    first, *rest = lines.read_text().splitlines()
    lines.write_text("\n".join([json.dumps({**json.loads(first), "answer": "queue: access!"}), *rest]))
    assert ("compare/tuned.jsonl", "test.jsonl:1, answer of eval/tuned.jsonl") in told(checked(run))
    path = run.compare / "compare.json"  # of other settings the answers may be others
    value = read_json(path)
    value["evaluate"]["max_tokens"] += 1
    path.write_text(json.dumps(value))
    assert not any("of eval/" in key for _, key in told(checked(run)))


def test_a_curve_that_was_cut_off_is_one_difference(run: RunDir) -> None:
    path = run.compare / "compare.json"
    value = read_json(path)
    value["learning_curve"] = None
    path.write_text(json.dumps(value))
    assert told(checked(run)) == {(FILE, "learning_curve")}


def test_cards_and_the_picture_of_losses_are_checked_where_they_are_as_written(run: RunDir) -> None:
    before = verify(run).files
    card.write_adapter(run)
    card.write_fused(run.fused, run)
    run.loss_picture.write_text(build.loss_picture(run))
    found = verify(run)
    assert (found.differences, found.unchecked, found.files) == ([], [], before + 3)
    page = run.fused / "README.md"
    page.write_text(page.read_text() + "\nAsk Ms Example about it.\n")
    found = verify(run)
    assert (found.differences, found.unchecked) == ([], ["fused/README.md (edited, or written elsewhere)"])


def test_sizes_of_the_curve_are_those_of_the_training_rows(run: RunDir) -> None:
    rows = load.read_split(run.data, "train")
    parts = learning_curve.nested(rows, list(evidence.curve_files(run.compare)), 0)
    points = read_json(run.compare / "compare.json")["learning_curve"]["points"]
    assert [point["rows"] for point in points] == [len(each) for each in parts.values()] == [192, 384, 768]


@pytest.mark.parametrize(
    ("percent", "name"), [(25.0, "25.jsonl"), (12.5, "12.5.jsonl"), (100 / 3, f"{100 / 3!r}.jsonl")]
)
def test_the_name_of_a_size_gives_its_per_cent(tmp_path: Path, percent: float, name: str) -> None:
    assert evidence.curve_name(percent) == name
    evidence.write(evidence.curve(tmp_path) / name, [])
    (evidence.curve(tmp_path) / "nan.jsonl").write_text("")
    (evidence.curve(tmp_path) / "notes.jsonl").write_text("")
    assert list(evidence.curve_files(tmp_path)) == [percent]

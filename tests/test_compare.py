"""The whole comparison on a small run: its files, its figures against the parts that give them, what is refused."""

import gc
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxtune import adapter, compare, evaluate, fidelity, generate, hub, model, pipeline, recipe
from mlxtune.comparison import contrast
from mlxtune.comparison.finished import open_run
from mlxtune.errors import DataError, InputError, MlxtuneError, ModelError, OutputError, RecipeError, StorageError
from mlxtune.metrics import divergence
from mlxtune.recipe import CompareRecipe, Recipe
from mlxtune.report.decision import decide
from mlxtune.rundir import RunDir
from tests.chat_server import Server, said

LABELS = ("card", "refund", "parcel")
WORDS = "blue lamp shop desk week name road tree hand door year note bird song line rain".split()  # noqa: SIM905
NAMES = ["base", "prompt", "few_shot", "retrieval", "tuned", "fused", "fused_8bit", "tiny", "endpoint"]


def rows(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        label = LABELS[number % 3]
        found.append({"prompt": f"my {label} {' '.join(draw.sample(WORDS, 6))}", "completion": label})
    return found


@dataclass(frozen=True)
class Compared:
    """A finished run with its recipe, what comparing it gave, and how often the server was asked. Nobody changes it."""

    run: RunDir
    recipe: Recipe
    value: dict[str, Any]
    asked: int


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Says `parcel`, or as a judge always `A`."""
    started = Server(
        lambda number, body: (
            200,
            said("A" if "Two assistants" in body["messages"][0]["content"] else "parcel", prompt_tokens=9),
            {},
        )
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    (folder / "data").mkdir()
    train, test = rows(60, 1), rows(18, 2)
    test[4] = {"prompt": train[4]["prompt"] + "s", "completion": test[4]["completion"]}
    for name, some in (("train", train), ("valid", rows(9, 3)), ("test", test)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = {
        "model": "tiny",
        "data": {"path": str(folder / "data")},
        "train": {"iters": 30, "batch_size": 8, "learning_rate": 5e-3, "show_answer": False},
        "evaluate": {"max_tokens": 6},
        "compare": None,
    }
    made = recipe.build(settings, where="test")
    run = RunDir(folder / "run")
    stages = tuple(stage for stage in pipeline.STAGES if stage != "compare")
    pipeline.run(made, run.root, stages=stages)
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}?", "choices": ["one", "two"], "answer": n % 2}) + "\n" for n in range(6))
    )
    (folder / "anchor.txt").write_text("Once upon a time there was a lamp in a shop. " * 30)
    wanted = CompareRecipe(
        few_shot=2,
        anchor=str(folder / "anchor.txt"),
        widths=[8],
        models=["tiny"],
        endpoint=server.url,
        endpoint_model="m",
        judge=server.url,
        choices=str(folder / "questions.jsonl"),
    )
    whole = replace(made, compare=wanted)
    before = len(server.seen)
    value = compare.compare(run, whole, since=run)
    return Compared(run, whole, value, len(server.seen) - before)


def lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.compare / f"{name}.jsonl").read_text().splitlines()]


def anchor(compared: Compared) -> str:
    """A short text, so that what is forgotten is soon measured."""
    assert compared.recipe.compare is not None
    return str(compared.recipe.compare.anchor)


def candidate(compared: Compared, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in compared.value["candidates"] if each["name"] == name)
    return found


def score(candidate: dict[str, Any], metric: str) -> float:
    return float(next(each["value"] for each in candidate["scores"] if each["metric"] == metric))


def test_the_folder_and_its_files(compared: Compared) -> None:
    files = sorted(path.name for path in compared.run.compare.iterdir())
    assert files == sorted(["compare.json", "evidence", *(f"{name}.jsonl" for name in NAMES)])
    kept = sorted(path.name for path in (compared.run.compare / "evidence").iterdir())
    assert kept == ["choices.jsonl", "forgetting.jsonl", "judged.jsonl", "since.jsonl"]
    assert json.loads((compared.run.compare / "compare.json").read_text()) == compared.value
    assert compared.value.keys() == {
        *("rows", "metric", "candidates", "left_out", "verdict", "flips", "flips_since", "forgetting"),
        *("contamination", "judged", "learning_curve", "settings", "evaluate", "labels"),
    }
    assert [each["name"] for each in compared.value["candidates"]] == NAMES
    assert (compared.value["rows"], compared.value["left_out"]) == (18, {})
    for name in NAMES:
        assert [Path(each["where"]).name for each in lines(compared.run, name)] == [
            f"test.jsonl:{line}" for line in range(1, 19)
        ]


def test_kinds_and_descriptions(compared: Compared, server: Server) -> None:
    kinds = {each["name"]: each["kind"] for each in compared.value["candidates"]}
    assert kinds == {name: "tuned" if name in ("tuned", "fused", "fused_8bit") else "untuned" for name in NAMES}
    assert candidate(compared, "endpoint")["description"] == f"m at {server.url}, asked as `prompt`"


def test_each_candidate_is_what_its_model_gives(compared: Compared) -> None:
    finished = open_run(compared.run, compared.recipe)
    lm = finished.load_base()
    for name in ("base", "tuned"):
        if name == "tuned":
            adapter.load(lm, compared.run.adapter)
        done = evaluate.evaluate(lm, finished.samples("test"), compared.recipe.evaluate)
        found = candidate(compared, name)
        wanted = {each.metric: each.value for each in done.scores}
        assert score(found, "loss") == pytest.approx(wanted["loss"], rel=1e-5)
        assert score(found, "exact_match") == wanted["exact_match"]
        assert [each["answer"] for each in lines(compared.run, name)] == [each.answer for each in done.predictions]
        assert found["cost"]["prompt_tokens"] == pytest.approx(done.cost["prompt_tokens"])


def test_another_model_that_is_the_base_gives_the_same(compared: Compared) -> None:
    other, base = candidate(compared, "tiny"), candidate(compared, "base")
    assert score(other, "loss") == pytest.approx(score(base, "loss"), rel=1e-6)
    assert other["cost"]["bytes"] == base["cost"]["bytes"]


def test_what_the_candidates_take_on_the_disk(compared: Compared) -> None:
    sizes = {each["name"]: each["cost"]["bytes"] for each in compared.value["candidates"]}
    weights = compared.run.adapter / "adapters.safetensors"
    assert sizes["tuned"] == sizes["base"] + weights.stat().st_size
    assert sizes["fused"] == (compared.run.fused / "model.safetensors").stat().st_size
    assert sizes["fused_8bit"] < 0.4 * sizes["fused"]
    assert sizes["endpoint"] is None


def test_prompts_cost_what_they_hold(compared: Compared) -> None:
    tokens = {each["name"]: each["cost"]["prompt_tokens"] for each in compared.value["candidates"]}
    assert tokens["base"] == tokens["tuned"] == tokens["fused"]
    assert tokens["base"] < tokens["prompt"]
    assert tokens["base"] < tokens["few_shot"] < tokens["retrieval"]
    assert tokens["endpoint"] == 9


def test_differences_and_verdict_follow_from_the_predictions(compared: Compared) -> None:
    value = compared.value
    predictions = {name: lines(compared.run, name) for name in NAMES}
    untuned = next(each["difference"]["against"] for each in value["candidates"] if each["difference"] is not None)
    wanted = contrast.differences(predictions, untuned, value["metric"])
    assert {each["name"]: each["difference"] for each in value["candidates"]} == wanted
    assert [name for name in NAMES if wanted[name] is None] == [untuned]
    assert value["verdict"] == decide(value["candidates"], value["metric"], value["forgetting"], value["contamination"])
    assert (value["metric"], value["verdict"]["decision"]) == ("accuracy", "tune")
    assert value["flips"]["from"] == untuned
    assert value["flips"]["fixed"] > value["flips"]["broken"]


def test_the_servers_answers(compared: Compared) -> None:
    found = lines(compared.run, "endpoint")
    assert {each["answer"] for each in found} == {"parcel"}
    assert [each["right"] for each in found] == [each["expected"] == "parcel" for each in found]
    assert {each["loss"] for each in found} == {None}
    assert score(candidate(compared, "endpoint"), "accuracy") == pytest.approx(6 / 18)
    assert compared.asked == 1 + 18 + 2 * 18  # whether it is there, each row, each pair of answers in both orders


def test_a_judge_who_always_says_a(compared: Compared) -> None:
    judged = compared.value["judged"]
    assert (judged["wins"], judged["ties"], judged["losses"], judged["swayed"]) == (0, 18, 0, 18)


def test_forgetting(compared: Compared) -> None:
    found = compared.value["forgetting"]
    base = model.load(open_run(compared.run, compared.recipe).base)
    text = fidelity.read_text(base, found["anchor"])
    tuned = model.load(base.path)
    adapter.load(tuned, compared.run.adapter)
    wanted = divergence.measure(base.net, tuned.net, text)
    assert found["budget"] == 0.1
    assert found["kl"] == pytest.approx(wanted.kl_mean, rel=1e-3)
    assert found["choices"]["n"] == 6
    assert found["choices"]["base"]["metric"] == found["choices"]["tuned"]["metric"] == "acc"


def test_the_test_row_that_is_near_a_training_row(compared: Compared) -> None:
    found = compared.value["contamination"]
    assert found["count"] == 1
    assert [Path(found["near"][0][name]).name for name in ("test", "train")] == ["test.jsonl:5", "train.jsonl:5"]
    without = {each["name"]: each["scores"] for each in found["without"]}
    assert list(without) == NAMES
    right = [each["right"] for each in lines(compared.run, "tuned")]
    accuracy = next(each for each in without["tuned"] if each["metric"] == "accuracy")
    assert (accuracy["n"], accuracy["value"]) == (17, pytest.approx((sum(right) - right[4]) / 17))


def test_nothing_changed_since_the_same_run(compared: Compared) -> None:
    since = compared.value["flips_since"]
    if since is None:
        pytest.skip("the run keeps no predictions")
    assert (since["from"], since["to"], since["fixed"], since["broken"]) == ("tuned of run", "tuned", 0, 0)


def test_what_the_run_has_measured_is_taken_from_it(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(compared.run.root, run.root)
    finished = open_run(run, compared.recipe)
    shutil.rmtree(run.evaluation("base").parent)
    for name in ("base", "tuned", "fused"):
        done = evaluate.evaluate(finished.load_base(), finished.samples("test")[:2], compared.recipe.evaluate)
        evaluate.write(
            replace(done, cost={**done.cost, "seconds_per_row": 77.0}), run.evaluation(name), run.predictions(name)
        )
    small = replace(
        compared.recipe, compare=CompareRecipe(few_shot=0, retrieval=False, prompt="Say it.", anchor=anchor(compared))
    )
    value = compare.compare(run, small, out=tmp_path / "out")
    taken = {each["name"]: each["cost"]["seconds_per_row"] == 77.0 for each in value["candidates"]}
    assert taken == {"base": True, "prompt": False, "tuned": True, "fused": True}
    longer = replace(small, evaluate=replace(small.evaluate, max_tokens=7))
    value = compare.compare(run, longer, out=tmp_path / "longer")
    assert all(each["cost"]["seconds_per_row"] != 77.0 for each in value["candidates"])


def test_settings_are_kept_with_the_result(compared: Compared) -> None:
    assert compared.value["settings"] == asdict(compared.recipe.compare)  # type: ignore[arg-type]
    assert compared.value["evaluate"] == asdict(compared.recipe.evaluate)
    found = open_run(compared.run, compared.recipe).label_set()
    assert compared.value["labels"] == list(found.labels if found is not None else [])


@pytest.fixture(scope="module")
def wrong(compared: Compared, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of texts that are none, a model that is none, and the run's adapter as if of another base."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty.txt").write_text("")
    (folder / "bytes.txt").write_bytes(bytes(range(128, 256)))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    shutil.copytree(compared.run.adapter, folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_fingerprint": "other"}))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "error", "line"),
    [
        (CompareRecipe(prompt=" "), RecipeError, "compare.prompt: is empty"),
        (CompareRecipe(endpoint="file:///x"), InputError, "compare.endpoint: is 'file:///x'"),
        (CompareRecipe(endpoint="http://127.0.0.1:9"), InputError, "compare.endpoint_model: is not set"),
        (CompareRecipe(judge="http://127.0.0.1:9"), InputError, "compare.endpoint_model: is not set"),
        (CompareRecipe(choices="absent.jsonl"), DataError, "absent.jsonl: "),
        (CompareRecipe(documents="absent"), DataError, "absent: is not a folder"),
        (CompareRecipe(anchor="absent.txt"), DataError, "absent.txt: no such file"),
        (CompareRecipe(models=["absent"]), InputError, "absent: no such folder"),
        (CompareRecipe(widths=[7]), RecipeError, "compare.widths"),
        (CompareRecipe(anchor="WRONG/empty.txt"), DataError, "WRONG/empty.txt: has no text"),
        (CompareRecipe(anchor="WRONG/bytes.txt"), DataError, "WRONG/bytes.txt: is not UTF-8"),
        (CompareRecipe(models=["WRONG/model"]), ModelError, "WRONG/model/config.json: names no model_type"),
        (CompareRecipe(models=["tiny+WRONG/adapter"]), ModelError, "WRONG/adapter: was trained on another base"),
        (CompareRecipe(judge="WRONG/model"), ModelError, "WRONG/model/config.json: names no model_type"),
    ],
)
def test_wrong_settings_are_found_before_anything_is_loaded(
    compared: Compared,
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: CompareRecipe,
    error: type[MlxtuneError],
    line: str,
) -> None:
    monkeypatch.setattr(model, "load", None)
    monkeypatch.chdir(tmp_path)
    settings = CompareRecipe(**json.loads(json.dumps(asdict(settings)).replace("WRONG", wrong)))
    with pytest.raises(error) as caught:
        compare.compare(compared.run, replace(compared.recipe, compare=settings), out=tmp_path / "out")
    assert str(caught.value).startswith(line.replace("WRONG", wrong))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_and_one_without_a_run(compared: Compared, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        compare.compare(compared.run, compared.recipe)
    with pytest.raises(InputError, match="holds no run"):
        compare.compare(RunDir(tmp_path), compared.recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["endpoint", "judge"])
def test_a_server_that_is_not_there_is_found_at_once(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(model, "load", None)
    broken = Server(lambda number, body: (403, {"error": "go away"}, {}))
    settings = CompareRecipe(endpoint_model="m", **{name: broken.url})  # type: ignore[arg-type]
    try:
        with pytest.raises(StorageError, match="answers 403: go away"):
            compare.compare(compared.run, replace(compared.recipe, compare=settings), out=tmp_path / "out")
        assert len(broken.seen) == 1
    finally:
        broken.close()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_run_of_other_rows(compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load", None)
    other = RunDir(tmp_path / "other")
    shutil.copytree(compared.run.root / "eval", other.root / "eval")
    text = other.predictions("tuned").read_text()
    other.predictions("tuned").write_text(text.replace('"prompt": "', '"prompt": "once '))
    with pytest.raises(InputError, match="other: has no test row of this run; --against takes a run on the same"):
        compare.compare(compared.run, compared.recipe, out=tmp_path / "out", since=other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


class _Ring:
    """0.4 GB in a cycle, which only the collector of garbage frees."""

    def __init__(self) -> None:
        self.itself, self.held = self, mx.ones(10**8)
        mx.eval(self.held)


def test_memory_is_that_of_the_candidate(compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CompareRecipe(few_shot=0, retrieval=False, anchor=anchor(compared))
    wanted = replace(compared.recipe, compare=settings, evaluate=replace(compared.recipe.evaluate, max_tokens=5))
    load = model.load

    def leaving(*args: Any, **kwargs: Any) -> model.LanguageModel:
        _Ring()
        return load(*args, **kwargs)

    monkeypatch.setattr(model, "load", leaving)
    gc.disable()
    try:
        value = compare.compare(compared.run, wanted, out=tmp_path / "out")
    finally:
        gc.enable()
    assert all(each["cost"]["peak_memory_gb"] < 0.4 for each in value["candidates"])


def test_a_server_that_fails_leaves_nothing(compared: Compared, tmp_path: Path) -> None:
    broken = Server(lambda number, body: (403, {"error": "go away"}, {}) if number else (200, said("OK"), {}))
    settings = CompareRecipe(
        few_shot=0, retrieval=False, anchor=anchor(compared), endpoint=broken.url, endpoint_model="m"
    )
    try:
        with pytest.raises(StorageError, match="answers 403: go away"):
            compare.compare(compared.run, replace(compared.recipe, compare=settings), out=tmp_path / "out")
    finally:
        broken.close()
    assert list(tmp_path.iterdir()) == []


def test_a_model_may_judge() -> None:
    """What it says is its greedy answer, cut after the tokens that a verdict takes."""
    asked = [[{"role": "user", "content": "Say A or B."}], [{"role": "user", "content": "A, B, or tie?"}]]
    told: list[tuple[str, int, int]] = []
    said = compare._judge("tiny", None, lambda what, done, total: told.append((what, done, total)))(asked, 3)
    lm = model.load(hub.fetch("tiny"))
    pieces = generate.stream(lm, generate.prompt_tokens(lm, asked[1]), max_tokens=3)
    assert said[1] == "".join(piece.text for piece in pieces)
    assert told == [("judge", 1, 2), ("judge", 2, 2)]

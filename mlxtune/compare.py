"""Was tuning worth it? Every candidate on the same held-out rows, their differences, costs, and a verdict.

Candidates are the base as it is, with a prompt, with examples, with retrieved passages; the tuned and the fused model;
and what else the recipe names. Knows a run folder, not the terminal.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxtune import adapter, generate, hub, model
from mlxtune import recipe as recipes
from mlxtune.comparison import candidates, contamination, contrast, endpoint, evidence, forgetting, judge, retrieval
from mlxtune.comparison.contrast import Prediction
from mlxtune.comparison.finished import Asked, open_run
from mlxtune.comparison.scoring import Known, OnProgress, Scored, Scoring, read_evaluation
from mlxtune.data import files
from mlxtune.errors import InputError
from mlxtune.evaluation import multiple_choice
from mlxtune.recipe import CompareRecipe, Recipe
from mlxtune.report.decision import best, decide
from mlxtune.rundir import RunDir, refuse_existing, staged, write_json

RESULT = "compare.json"

OnBytes = Callable[[int, int], None]


def ignore(what: str, done: int, total: int) -> None:
    """An `OnProgress` that does nothing."""


def compare(
    run: RunDir,
    recipe: Recipe,
    *,
    source: Path | None = None,
    out: Path | None = None,
    since: RunDir | None = None,
    on_progress: OnProgress = ignore,
) -> dict[str, Any]:
    """Compares the candidates of `recipe.compare` on a run's test rows; writes the folder `out`, or the run's own.

    `source` is the original base, where the caller has it; `since` an earlier run, to tell which rows changed. Returns
    what compare.json holds. Raises InputError for a folder without a run and for settings that name what is not there,
    and what loading, evaluating, fusing and asking raise; nothing is written then.
    """
    settings = recipe.compare if recipe.compare is not None else CompareRecipe()
    target = out if out is not None else run.compare
    refuse_existing(target, "--out")

    def on_bytes(done: int, total: int) -> None:
        on_progress("fetch (MB)", done // 10**6, total // 10**6)

    check(settings, on_bytes)
    finished = open_run(run, recipe, source, on_bytes)
    earlier = read_evaluation(since, "tuned") if since is not None else None
    for server in _servers(settings):
        endpoint.ask(server, [{"role": "user", "content": "Say OK."}], max_tokens=8)  # is anyone there?
    work = Scoring(finished, settings, on_progress)
    if earlier is not None and since is not None:
        _refuse_other_rows(since, earlier, work)
    with staged(target) as scratch:
        work.score_all()
        value = summed_up(work)
        if earlier is not None and since is not None and value["metric"] is not None:
            value["flips_since"] = _flips_since(since.root.name, earlier, work, value["metric"])
        for each in work.scored:
            evidence.write(scratch / f"{each.name}.jsonl", each.predictions)
        for name, lines in work.evidence.items():
            evidence.write(evidence.file(scratch, name), lines)
        write_json(scratch / RESULT, value)
    return value


def check(settings: CompareRecipe, on_bytes: OnBytes = lambda done, total: None) -> None:
    """Refuses what is wrong with the settings before anything is loaded; brings the models here that they name.

    Raises InputError, and what `hub.fetch` raises.
    """
    if settings.prompt is not None:
        candidates.check_prompt(settings.prompt)
    if settings.endpoint is not None:
        endpoint.check(settings.endpoint, settings.endpoint_model)
    if settings.documents is not None and settings.retrieval:
        retrieval.of_folder(settings.documents)
    if settings.choices is not None:
        multiple_choice.read(files.resolve(settings.choices))
    if settings.anchor is not None:
        forgetting.check_anchor(settings.anchor)
    for width in settings.widths:
        recipes.check_quantization(width, 64, "affine", "compare.widths")
    for given in settings.models:
        base, _, own = given.partition("+")
        folder = hub.fetch(base, None, on_bytes)
        if own:
            _check_fits(folder, Path(own).expanduser())
        else:
            model.check(folder)
    if settings.judge is not None and endpoint.is_url(settings.judge):
        endpoint.check(settings.judge, settings.endpoint_model)
    elif settings.judge is not None:
        model.check(hub.fetch(settings.judge, None, on_bytes))


def _check_fits(folder: Path, own: Path) -> None:
    """Refuses an adapter that does not fit a model; no weight of the model is read. Raises ModelError."""
    adapter.check(own)
    net, config = model.outline(folder)
    adapter.load(model.LanguageModel(net, Asked.of(folder, None).tokenizer, config, folder), own)


def _servers(settings: CompareRecipe) -> list[endpoint.Endpoint]:
    """The servers that will be asked, each once."""
    urls = [settings.endpoint, settings.judge if endpoint.is_url(settings.judge or "") else None]
    return [endpoint.check(url, settings.endpoint_model) for url in dict.fromkeys(urls) if url is not None]


def _refuse_other_rows(since: RunDir, earlier: Known, work: Scoring) -> None:
    """Refuses an earlier run that has no row of this one. Raises InputError."""
    decode = work.finished.asked.tokenizer.decode
    now = [
        {"prompt": decode(each.tokens[: each.prompt_length]), "expected": each.answer} for each in work.plain.samples
    ]
    if not contrast.same_rows(earlier.predictions, now):
        hint = "--against takes a run on the same test rows and chat template"
        raise InputError("has no test row of this run", where=since.root, hint=hint)


def summed_up(work: Scoring) -> dict[str, Any]:
    """What compare.json holds: the candidates with their differences, the verdict, and what else was measured.

    Asks the judge, where the settings name one.
    """
    metric = contrast.metric_of([(each.kind, each.scores) for each in work.scored])
    predictions = {each.name: each.predictions for each in work.scored}
    lines = [_line(each) for each in work.scored]
    untuned = best(lines, metric, "untuned") if metric is not None else None
    tuned = best(lines, metric, "tuned") if metric is not None else None
    flips = judged = None
    if metric is not None and untuned is not None and tuned is not None:
        found = contrast.differences(predictions, untuned, metric)
        lines = [{**each, "difference": found[each["name"]]} for each in lines]
        flips = contrast.flips(predictions[untuned], predictions[tuned], (untuned, tuned), metric)
        judged = _judged(work, predictions[untuned], predictions[tuned], (untuned, tuned))
    near = contamination.measured(work.finished.rows["train"], work.plain.rows, predictions)
    return {
        "rows": len(work.plain.samples),
        "metric": metric,
        "candidates": lines,
        "left_out": work.left_out,
        "verdict": decide(lines, metric, work.forgotten, near),
        "flips": flips,
        "flips_since": None,
        "forgetting": work.forgotten,
        "contamination": near,
        "judged": judged,
        "learning_curve": None,
        "settings": asdict(work.settings),
        "evaluate": asdict(work.recipe.evaluate),
        "labels": list(work.labels.labels if work.labels is not None else work.recipe.evaluate.labels),
    }


def _line(scored: Scored) -> dict[str, Any]:
    return {
        "name": scored.name,
        "kind": scored.kind,
        "description": scored.description,
        "scores": [score.to_dict() for score in scored.scores],
        "difference": None,
        "cost": scored.cost,
    }


def _flips_since(name: str, earlier: Known, work: Scoring, metric: str) -> dict[str, Any] | None:
    """The rows that changed since the tuned model of the run `name`; None where no row is the same."""
    now = next((each.predictions for each in work.scored if each.name == "tuned"), [])
    before = [{**one, "where": other["where"]} for one, other in contrast.same_rows(earlier.predictions, now)]
    if before:
        work.evidence[evidence.SINCE] = before
    return contrast.flips_since(before, now, f"tuned of {name}", metric)


def _judged(
    work: Scoring, before: Sequence[Prediction], after: Sequence[Prediction], names: tuple[str, str]
) -> dict[str, Any] | None:
    """What a judge says of the best tuned candidate's answers, against those of the best untuned one."""
    name = work.settings.judge
    pairs = judge.pairs_of(before, after) if name is not None else []
    if name is None or not pairs:
        return None
    said = judge.verdicts(pairs, _judge(name, work.settings.endpoint_model, work.on_progress))
    work.evidence[evidence.JUDGED] = [
        {"where": pair.where, "verdicts": list(each)} for pair, each in zip(pairs, said, strict=True)
    ]
    return {"judge": name, "better": names[1], "than": names[0], **judge.summed_up(said, work.recipe.seed).to_dict()}


def _judge(name: str, served: str | None, on_progress: OnProgress) -> judge.Ask:
    """How to ask the judge: a server by its URL, or a model."""

    def told(done: int, total: int) -> None:
        on_progress("judge", done, total)

    if endpoint.is_url(name):
        server = endpoint.check(name, served)
        return lambda asked, most: [
            reply.text for reply in endpoint.ask_all(server, asked, max_tokens=most, on_progress=told)
        ]
    folder = hub.fetch(name)

    def ask(asked: list[list[dict[str, str]]], most: int) -> list[str]:
        lm = model.load(folder)
        prompts = [generate.prompt_tokens(lm, each) for each in asked]
        return [each.text for each in generate.answers(lm, prompts, max_tokens=most, on_progress=told)]

    return ask

"""Every candidate of a comparison, scored on the same rows: predictions, scores and what a row costs. No statistics.

One model is in memory at a time. Knows models, adapters and servers; what the run itself has measured in the same way
is taken from its files.
"""

import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune import adapter, hub, model
from mlxtune import recipe as recipes
from mlxtune.comparison import candidates, endpoint, evidence, forgetting, prompted
from mlxtune.comparison.finished import Asked, Finished
from mlxtune.comparison.prompted import Plan
from mlxtune.convert import convert
from mlxtune.data import files
from mlxtune.data.formats import Text, answer_text, prompt_text
from mlxtune.data.render import Limit
from mlxtune.errors import InputError
from mlxtune.evaluate import evaluate
from mlxtune.evaluation import multiple_choice, predictions, tally
from mlxtune.evaluation.labelset import LabelSet, label_of
from mlxtune.evaluation.predictions import Prediction
from mlxtune.fuse import fuse
from mlxtune.metrics.exact_match import is_exact
from mlxtune.metrics.intervals import share
from mlxtune.model import LanguageModel
from mlxtune.recipe import CompareRecipe, QuantizeRecipe
from mlxtune.report.score import Score
from mlxtune.rundir import RunDir, read_json, size_of

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate: `untuned` or `tuned`, its scores, its predictions as lines of JSONL, and what a row costs."""

    name: str
    kind: str
    description: str
    scores: list[Score]
    predictions: list[dict[str, Any]]
    cost: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Known:
    """An evaluation that a run has of its test rows."""

    scores: list[Score]
    predictions: list[dict[str, Any]]
    cost: dict[str, Any]


class Scoring:
    """The candidates that are scored so far, what else was measured, and the lines that this is summed from.

    Without `reuse` the models are asked what the run's evaluations have measured already.
    """

    def __init__(self, finished: Finished, settings: CompareRecipe, on_progress: OnProgress, *, reuse: bool = True):
        self.finished, self.settings, self.on_progress = finished, settings, on_progress
        self.run, self.recipe = finished.run, finished.recipe
        self.plans = prompted.plans(finished, settings, on_progress)
        self.plain = self.plans.made[0]
        self.scored: list[Scored] = []
        self.left_out = dict(self.plans.left_out)
        self.forgotten: dict[str, Any] | None = None
        self.evidence: dict[str, list[dict[str, Any]]] = {}  # by the names of `evidence`
        # what the run has measured of the same rows, in the same way
        self.same = self.recipe.data.mask_prompt and recipes.load(self.run.recipe).evaluate == self.recipe.evaluate
        self.reuse = reuse and self.same
        self.labels = finished.label_set()
        self.groups = finished.groups("test")

    def score_all(self) -> None:
        self._base_and_tuned()
        if self.run.fused.is_dir():
            what = "the adapter fused into the base"
            self._score("fused", "tuned", what, lambda: model.load(self.run.fused), self.run.fused)
            for width in self.settings.widths:
                self._fused_at(width)
        for name in self.settings.models:
            self._other(name)
        if self.settings.endpoint is not None:
            self._endpoint()

    def _base_and_tuned(self) -> None:
        """The base in all its ways, then the same network with the adapter; what it forgot lies between the two."""
        loaded: list[LanguageModel] = []

        def lm() -> LanguageModel:
            if not loaded:
                self.on_progress("base", 0, 1)
                loaded.append(self.finished.load_base())
            return loaded[0]

        for plan in self.plans.made:
            self._score(plan.name, "untuned", plan.description, lm, self.finished.base, plan=plan)
        if not self.run.adapter.is_dir():
            self.left_out["tuned"] = "the run has no adapter"
            return
        self.forgotten = self._forgetting(lm())
        self._score("tuned", "tuned", "the base with the adapter", lm, self.finished.base, self.run.adapter)

    def _forgetting(self, lm: LanguageModel) -> dict[str, Any]:
        """Measures the base, attaches the adapter to it, and measures again. What was kept of the base is then gone."""
        anchor, samples = forgetting.anchor_samples(lm, self.settings.anchor, self.recipe.data.path, self.recipe.seed)
        told = 2 * len(samples)
        before = forgetting.remember(lm.net, samples, lambda done: self.on_progress("forgetting", done, told))
        chosen = [self._choices(lm)]
        adapter.load(lm, self.run.adapter)
        windows = forgetting.measure(
            before, lm.net, lambda done: self.on_progress("forgetting", len(samples) + done, told)
        )
        chosen.append(self._choices(lm))
        self.evidence[evidence.FORGETTING] = [asdict(each) for each in windows]
        choices = None
        if self.settings.choices is not None:
            lines = [
                {"where": each.where, "right": each.right, "base": base, "tuned": tuned}
                for (each, base), (_, tuned) in zip(*chosen, strict=True)
            ]
            self.evidence[evidence.CHOICES] = lines
            choices = choices_of(self.settings.choices, lines)
        found = forgetting.summed_up(windows)
        return {"anchor": anchor, **found, "budget": self.recipe.train.forget_budget, "choices": choices}

    def _choices(self, lm: LanguageModel) -> list[tuple[multiple_choice.Question, int]]:
        """What a model chooses in each multiple-choice question, where a file of them is named."""
        if self.settings.choices is None:
            return []
        questions = multiple_choice.read(files.resolve(self.settings.choices))
        done = multiple_choice.measure(lm, questions, lambda at, of: self.on_progress("choices", at, of))
        return [(each, chosen) for each, (chosen, _) in zip(questions, done.chosen, strict=True)]

    def _fused_at(self, width: int) -> None:
        """The fused model in another width: fused anew into a packed base, else packed."""
        name = f"fused_{width}bit"
        with tempfile.TemporaryDirectory(prefix="mlxtune-compare-") as scratch:
            folder = Path(scratch) / "model"
            if "quantization" in model.check(self.finished.base):
                settings = replace(self.recipe.fuse, bits=width, dequantize=False, original=False, accept_loss=True)
                samples, training = self.finished.samples("valid"), self.finished.samples("train")
                fuse(
                    self.finished.base, self.run.adapter, folder, settings, samples, training,
                    on_phase=lambda what, done, total: self.on_progress(f"{name}, {what}", done, total),
                )  # fmt: skip
            else:
                convert(self.run.fused, folder, quantize=QuantizeRecipe(bits=width))
            self._score(name, "tuned", f"the fused model in {width} bits", lambda: model.load(folder), folder)

    def _other(self, given: str) -> None:
        """Another model, a folder or a hub id, or MODEL+ADAPTER."""
        base, _, own = given.partition("+")
        folder = hub.fetch(base)
        adapter_path = Path(own).expanduser() if own else None
        template = adapter.check(adapter_path).get("chat_template") if adapter_path is not None else None
        asked = Asked.of(folder, template)
        if asked.template is not None and template is None and self.recipe.data.chat_template is not None:
            asked = Asked.of(folder, self.recipe.data.chat_template)  # it has none of its own
        rendered = asked.render(self.plain.rows, self.recipe, Limit(asked.room, prompted.CONTEXT), "drop")
        tuned = adapter_path is not None or (folder / "fuse.json").is_file()

        def load() -> LanguageModel:
            lm = model.load(folder, chat_template=asked.template)
            if adapter_path is not None:
                adapter.load(lm, adapter_path)
            return lm

        plan = Plan(self._free_name(given), given, self.plain.rows, rendered.samples)
        kind, labels = "tuned" if tuned else "untuned", self.finished.label_set(asked)
        self._score(plan.name, kind, given, load, folder, adapter_path, plan=plan, labels=labels)

    def _free_name(self, given: str) -> str:
        """A name for files and tables that no other candidate has."""
        stem = re.sub(r"[^\w.-]+", "-", "+".join(Path(each).name for each in given.split("+"))).strip("-.")[:60]
        taken = {each.name for each in self.scored} | {"compare", "endpoint"}
        names = [stem or "model", *(f"{stem or 'model'}-{number}" for number in range(2, 1000))]
        return next(name for name in names if name not in taken)

    def _score(
        self,
        name: str,
        kind: str,
        description: str,
        load: Callable[[], LanguageModel],
        folder: Path,
        adapter_path: Path | None = None,
        plan: Plan | None = None,
        labels: LabelSet | None = None,
    ) -> None:
        """Scores one local candidate, or takes what the run has measured of it."""
        size = sum(size_of(file) for file in model.weight_files(folder))
        size += size_of(adapter_path / adapter.WEIGHTS) if adapter_path is not None else 0
        known = read_evaluation(self.run, name) if self.reuse and name in ("base", "tuned", "fused") else None
        if known is None:
            samples = (plan or self.plain).samples
            lm = load()
            done = evaluate(
                lm,
                samples,
                self.recipe.evaluate,
                label_set=labels or self.labels,
                groups=self.groups,
                adapter_path=adapter_path,
                on_row=lambda phase, at, total: self.on_progress(f"{name}, {phase} ", at, total),
            )
            known = Known(done.scores, [asdict(each) for each in done.predictions], done.cost)
        self.scored.append(
            Scored(
                name=name,
                kind=kind,
                description=description,
                scores=known.scores,
                predictions=known.predictions,
                cost={**known.cost, "bytes": size},
            )
        )

    def _endpoint(self) -> None:
        """A server, asked with the recipe's best prompt where there is one. It tells no losses."""
        asked = endpoint.check(self.settings.endpoint, self.settings.endpoint_model)
        plan = next((each for each in self.plans.made if each.name == "prompt"), self.plain)
        rows = [(row, example) for row, example in plan.rows if not isinstance(example, Text)]
        conversations = [candidates.messages_asked(example) for _, example in rows]
        started = time.monotonic()
        replies = endpoint.ask_all(
            asked,
            conversations,
            max_tokens=self.recipe.evaluate.max_tokens,
            on_progress=lambda done, total: self.on_progress("endpoint", done, total),
        )
        seconds = (time.monotonic() - started) / max(1, len(rows))
        made = [
            self._answered(row.where, prompt_text(example), answer_text(example) or "", reply)
            for (row, example), reply in zip(rows, replies, strict=True)
        ]
        known = self.labels.labels if self.labels is not None else ()
        scores, _ = tally.tally(tally.Rows(made, replace(self.recipe.evaluate, metrics=[tally.AUTO]), known))
        self.scored.append(
            Scored(
                name="endpoint",
                kind="untuned",
                description=f"{asked.model} at {endpoint.shown(asked)}, asked as `{plan.name}`",
                scores=scores,
                predictions=[asdict(each) for each in made],
                cost={
                    "prompt_tokens": _mean([each.prompt_tokens for each in made]),
                    "answer_tokens": _mean([each.answer_tokens for each in made]),
                    "seconds_per_row": seconds,
                    "peak_memory_gb": None,
                    "bytes": None,
                },
            )
        )

    def _answered(self, where: str, prompt: str, expected: str, reply: endpoint.Reply) -> Prediction:
        """A server's answer as a prediction: what it thinks of the expected answer is not known."""
        pattern = self.recipe.evaluate.label
        compared = pattern is not None or self.labels is not None
        given, wanted = (label_of(text, pattern) if compared else None for text in (reply.text, expected))
        return Prediction(
            where=where,
            prompt=prompt,
            expected=expected,
            answer=reply.text,
            loss=None,
            tokens=0,
            exact=is_exact(reply.text, expected),
            right=given == wanted if compared else None,
            label=given,
            label_expected=wanted,
            prompt_tokens=reply.prompt_tokens,
            answer_tokens=reply.answer_tokens,
            group=self.groups.get(where),
        )


def read_evaluation(run: RunDir, name: str) -> Known | None:
    """An evaluation of a run, or None where it has none. Raises InputError for files of another shape."""
    path = run.evaluation(name)
    if not path.is_file() or not run.predictions(name).is_file():
        return None
    value = read_json(path)
    try:
        scores, cost = [Score(**each) for each in value["scores"]], dict(value["cost"])
    except (LookupError, TypeError, ValueError):
        raise InputError("is no evaluation", where=path, hint="remove the eval folder and run again") from None
    return Known(scores, [asdict(each) for each in predictions.read(run.predictions(name))], cost)


def choices_of(file: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shares of questions that base and tuned model answer right, of what each chooses, with Wilson's intervals."""
    n = len(lines)
    base, tuned = (share("acc", sum(each[name] == each["right"] for each in lines), n) for name in ("base", "tuned"))
    return {"file": file, "n": n, "base": base.to_dict(), "tuned": tuned.to_dict()}


def _mean(values: Sequence[int | None]) -> float | None:
    known = [each for each in values if each is not None]
    return sum(known) / len(known) if known else None

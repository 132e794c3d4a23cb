"""What each stage of a run does and leaves in its folder. Knows the verbs, not which stages a command asks for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mlxtune import adapter, fitting, model, origin, trackers
from mlxtune import evaluate as scores
from mlxtune import recipe as recipes
from mlxtune.compare import compare
from mlxtune.convert import convert
from mlxtune.data import load
from mlxtune.data.audit import audit
from mlxtune.data.files import Row
from mlxtune.data.formats import Text, answer_text
from mlxtune.data.labels import label_in
from mlxtune.data.render import Limit, Sample, render
from mlxtune.errors import DataError, FuseError
from mlxtune.evaluation import labelset
from mlxtune.evaluation.labelset import LabelSet
from mlxtune.fuse import fuse
from mlxtune.memory import Job, Rows
from mlxtune.model import LanguageModel
from mlxtune.recipe import Recipe
from mlxtune.recipe.settings import CALIBRATED
from mlxtune.report import build
from mlxtune.report.decision import IN_SHORT
from mlxtune.rundir import RunDir, make_folder, staged, write_json, write_text
from mlxtune.steplog import StepLog
from mlxtune.tokenizer import inner, load_for_rows
from mlxtune.train import Stop, train
from mlxtune.workers import Workers

STAGES = (
    "audit",
    "split",
    "convert",
    "quantize",
    "evaluate base",
    "train",
    "evaluate tuned",
    "fuse",
    "evaluate fused",
    "compare",
    "report",
)
ANCHOR_TOKENS, ANCHOR_PIECES = 512, 64
SHOWN = ("loss", "exact_match", "accuracy", "rouge_l")  # scores, in a stage's line


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happens in a run: a stage starts, goes on (`done` of `total`), validates, ends or is skipped, or warns."""

    kind: Literal["started", "progress", "validated", "finished", "skipped", "warning"]
    stage: str
    detail: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0


OnEvent = Callable[[Event], None]


class Stages:
    """The state of one run: what one stage made and later ones use again."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunDir,
        source: Path,
        files: dict[str, Path],
        on_event: OnEvent,
        stop: Stop,
        workers: Workers,
    ):
        self.recipe, self.folder, self.source, self.files = recipe, folder, source, files
        self.on_event, self.stop, self.workers = on_event, stop, workers
        self.stage = STAGES[0]
        self.audited: dict[str, Any] | None = None
        self.splits: dict[str, load.Rows] | None = None
        self.rendered: dict[str, list[Sample]] = {}
        self.template: str | None = None  # in place of the model's own, once the tokenizer is loaded
        self.base_lm: LanguageModel | None = None
        self.tuned_lm: LanguageModel | None = None

    def do(self, stage: str) -> None:
        """Does one stage, or says why it is skipped."""
        done, action = {
            "audit": (self.folder.data, self.audit),
            "split": (self.folder.data, self.split),
            "convert": (self.folder.origin, self.convert),
            "quantize": (self.folder.base, self.quantize),
            "evaluate base": (self.folder.evaluation("base"), self.evaluate_base),
            "train": (self.folder.adapter, self.train),
            "evaluate tuned": (self.folder.evaluation("tuned"), self.evaluate_tuned),
            "fuse": (self.folder.fused, self.fuse),
            "evaluate fused": (self.folder.evaluation("fused"), self.evaluate_fused),
            "compare": (self.folder.compare, self.compare),
            "report": (None, self.report),
        }[stage]
        if stage in ("quantize", "compare") and getattr(self.recipe, stage) is None:
            return self.on_event(Event(kind="skipped", stage=stage, detail=f"the recipe has no {stage} section"))
        if done is not None and done.exists():
            return self.on_event(Event(kind="skipped", stage=stage, detail="done already"))
        self.stage = stage
        self.on_event(Event(kind="started", stage=stage))
        started = time.monotonic()
        detail = action()
        self.on_event(Event(kind="finished", stage=stage, detail=detail, seconds=time.monotonic() - started))
        return None

    def audit(self) -> str:
        self.audited = audit(self.files, self.recipe.data, self.recipe.evaluate.label).to_dict()
        findings = [each for each in self.audited["findings"] if each["severity"] != "info"]
        for each in findings:
            if each["kind"] == "malformed":
                load.load_splits(self.recipe.data, self.recipe.seed, self.recipe.evaluate.label)  # raises it
        counts: dict[str, int] = {}
        for each in findings:
            name = {"pii": "personal data", "label": "label trouble"}.get(each["kind"], each["kind"].replace("_", " "))
            counts[name] = counts.get(name, 0) + each["count"]
        found = ", ".join(f"{count} × {name}" for name, count in counts.items()) or "nothing to mend"
        more = f"; see `mlxtune data check {self.recipe.data.path}`" if counts else ""
        return f"{self.audited['rows']} rows: {found}{more}"

    def split(self) -> str:
        self.splits = load.load_splits(self.recipe.data, self.recipe.seed, self.recipe.evaluate.label)
        losses = {name: found for name in self.splits if (found := self.render(name))}
        for name in ("train", "test"):
            if not self.rendered[name] and (name == "train" or self.recipe.data.test > 0):
                lost = f": {losses[name]}" if name in losses else ""
                hint = "raise train.max_seq_length" if lost else "give more rows"
                raise DataError(f"the {name} split has no rows{lost}", where=self.recipe.data.path, hint=hint)
        self.check_labels(self.splits["test"])
        if not self.folder.recipe.exists():
            make_folder(self.folder.root)
            write_text(self.folder.recipe, recipes.dump(self.recipe))
        with staged(self.folder.data) as scratch:
            for name, rows in self.splits.items():
                load.write_rows(scratch / f"{name}.jsonl", rows, self.recipe.data.group_by)
            write_json(scratch / "audit.json", self.audited)
        for name, rows in self.splits.items():  # evaluations name the same places if a later command makes them
            places = {
                row.where: f"{self.folder.data / name}.jsonl:{line}" for line, (row, _) in enumerate(rows, start=1)
            }
            self.rendered[name] = [replace(each, where=places[each.where]) for each in self.rendered[name]]
        counts = " · ".join(self.counted(name, len(rows)) for name, rows in self.splits.items())
        assert self.audited is not None
        alike = self.audited["rows"] - sum(map(len, self.splits.values()))
        kept_out = [f"{alike} left out, as like rows of two parts"] if alike else []
        return "; ".join([counts, *kept_out, *(f"{name}: {lost}" for name, lost in losses.items())])

    def counted(self, name: str, rows: int) -> str:
        """`train 621`, or `train 621 (700 samples)` where rows became more or fewer samples."""
        samples = len(self.rendered[name])
        return f"{name} {rows}" if samples == rows else f"{name} {rows} ({samples} samples)"

    def check_labels(self, rows: load.Rows) -> None:
        """Every expected answer has a label, where labels are compared: found here, not after an hour."""
        label = self.recipe.evaluate.label
        for row, example in rows if label is not None else ():
            answer = answer_text(example)
            if answer is not None and label_in(answer, label or "") is None:
                raise DataError(
                    f"evaluate.label {label!r} finds no label in its answer {answer[:60]!r}",
                    where=row.where,
                    hint="change the pattern or the row",
                )

    def render(self, name: str) -> str:
        """Renders one split; returns what of it was left out or cut."""
        rows = self.rows(name)
        rendered = render(
            rows,
            inner(self.tokenizer),
            self.tokenizer.eos_token_ids,
            self.recipe.data,
            Limit.of(self.recipe.train.max_seq_length, self.context),
            lambda done: self.told("", done, len(rows)),
        )
        self.rendered[name] = rendered.samples
        return rendered.losses

    def rows(self, name: str) -> load.Rows:
        return self.splits[name] if self.splits is not None else load.read_split(self.folder.data, name)

    def samples(self, name: str) -> list[Sample]:
        if name not in self.rendered:
            self.render(name)
        return self.rendered[name]

    @cached_property
    def config(self) -> dict[str, Any]:
        return model.check(self.source)

    @property
    def context(self) -> int | None:
        return model.context_length(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer, self.template = load_for_rows(self.source, self.config, self.recipe.data.chat_template)
        return tokenizer

    def convert(self) -> str:
        size = sum(file.stat().st_size for file in model.weight_files(self.source))
        write_json(self.folder.origin, origin.describe(self.recipe, self.source, self.files))
        return f"{self.config['model_type']}, {size / 1e6:.1f} MB, ready for MLX as it is"

    def quantize(self) -> str:
        assert self.recipe.quantize is not None
        seen = self.samples("train") if self.recipe.quantize.method in CALIBRATED else ()
        done = convert(
            self.source,
            self.folder.base,
            quantize=self.recipe.quantize,
            samples=seen,
            on_bytes=lambda done, total: self.told("MB", done // 10**6, total // 10**6),
        )
        for name, reason in list(done.left_out.items())[:3]:
            self.on_event(Event(kind="warning", stage="quantize", detail=f"{name} stays as it is: {reason}"))
        sizes = f"{done.bytes_before / 1e6:.1f} MB → {done.bytes_after / 1e6:.1f} MB"
        return f"{sizes}, {done.bits_per_weight:.2f} bits per weight"

    @property
    def base(self) -> Path:
        return self.folder.base if self.recipe.quantize is not None else self.source

    def load_base(self) -> LanguageModel:
        if self.base_lm is None:
            if not self.folder.adapter.exists():  # what cannot fit is refused before anything is loaded or evaluated
                net, config = model.outline(self.base)
                fitting.fitted(
                    Job.here(net, config, Rows.of([*self.samples("train"), *self.samples("valid")])), self.recipe
                )
            assert self.tokenizer is not None  # which finds the template
            self.base_lm = model.load(self.base, chat_template=self.template)
            if not self.folder.adapter.exists():
                adapter.check_fits(self.base_lm, self.recipe.lora)  # a wrong name is found before the evaluation
        return self.base_lm

    def load_tuned(self) -> LanguageModel:
        if self.tuned_lm is None:
            self.tuned_lm = self.load_base()
            adapter.load(self.tuned_lm, self.folder.adapter)
            self.base_lm = None
        return self.tuned_lm

    def evaluate_base(self) -> str:
        return self.evaluated("base", self.load_base(), None)

    def evaluate_tuned(self) -> str:
        return self.evaluated("tuned", self.load_tuned(), self.folder.adapter)

    def evaluate_fused(self) -> str:
        return self.evaluated("fused", model.load(self.folder.fused), None)

    def evaluated(self, name: str, lm: LanguageModel, adapter_path: Path | None) -> str:
        if not self.samples("test"):
            return "no test rows"
        done = scores.evaluate(
            lm,
            self.samples("test"),
            self.recipe.evaluate,
            label_set=self.label_set,
            groups=self.groups,
            adapter_path=adapter_path,
            on_row=self.told,
        )
        scores.write(done, self.folder.evaluation(name), self.folder.predictions(name))
        return summary(done)

    @cached_property
    def label_set(self) -> LabelSet | None:
        """The labels that the answers of the training rows choose from, if they do."""
        tokenizer = self.tokenizer
        return labelset.find(
            self.rows("train"), self.recipe.evaluate, inner(tokenizer), tokenizer.eos_token_ids, self.recipe.data
        )

    @cached_property
    def groups(self) -> dict[str, str]:
        """The group of each test row by its place, where the recipe says which rows belong together."""
        column = self.recipe.data.group_by
        found = {row.where: load.group_of(row, column) for row, _ in load.read_split(self.folder.data, "test")}
        return {where: str(each[column]) for where, each in found.items() if column in each}

    def compare(self) -> str:
        if not self.samples("test"):
            return "no test rows"
        self.base_lm = self.tuned_lm = None
        done = compare(self.folder, self.recipe, source=self.source, on_progress=self.told)
        return f"{len(done['candidates'])} candidates: {IN_SHORT[done['verdict']['decision']]}"

    def told(self, what: str, done: int, total: int) -> None:
        self.on_event(Event(kind="progress", stage=self.stage, detail=what, done=done, total=total))

    def train(self) -> str:
        lm = self.load_base()
        self.base_lm = None
        report_to = self.recipe.train.report_to if self.workers.first else []
        # before any progress line: what the trackers write would stand behind it
        with trackers.opened(report_to, self.folder, self.recipe, self.warn) as send:
            chats = any(sample.answer is not None for sample in self.samples("train"))
            data = replace(self.recipe.data, chat_template=self.template if chats else self.recipe.data.chat_template)
            done = train(
                lm,
                self.samples("train"),
                self.samples("valid"),
                replace(self.recipe, data=data),
                self.folder.root,
                anchor=self.anchor(),
                on_step=lambda log, steps: self.tell(log, steps, send),
                on_warning=self.warn,
                stop=self.stop,
                workers=self.workers,
            )
        self.tuned_lm = lm
        write_text(self.folder.loss_picture, build.loss_picture(self.folder))
        if done.first_valid_loss is None or done.best_valid_loss is None:
            return f"{done.steps} updates, loss {done.last_train_loss:.3f}, {done.tokens_per_second:.0f} tokens/s"
        early = ", stopped early" if done.stopped_early else ""
        chosen = f" of {done.grad_accumulation_steps} x {done.batch_size} rows" if self.recipe.train.fit_batch else ""
        losses = f"{done.first_valid_loss:.3f} → {done.best_valid_loss:.3f} (best at {done.best_step})"
        updates = f"{done.steps} updates{chosen}{early}"
        return f"{updates}, validation loss {losses}, {done.tokens_per_second:.0f} tokens/s"

    def warn(self, text: str) -> None:
        self.on_event(Event(kind="warning", stage="train", detail=text))

    def tell(self, log: StepLog, steps: int, send: Callable[[StepLog], None]) -> None:
        """Shows and draws how the training goes."""
        detail = f"loss {log.train_loss:.3f}  {log.tokens_per_second:.0f} tokens/s  {log.peak_memory_gb:.2f} GB"
        self.on_event(Event(kind="progress", stage="train", detail=detail, done=log.step, total=steps))
        send(log)
        if log.valid_loss is None:
            return
        write_text(self.folder.loss_picture, build.loss_picture(self.folder))
        anchor = f", anchor {log.anchor_loss:.3f}" if log.anchor_loss is not None else ""
        answer = f"  {' '.join(log.answer.split())!r}" if log.answer is not None else ""
        detail = f"{log.step}/{steps}: validation loss {log.valid_loss:.3f}{anchor}{answer}"
        self.on_event(Event(kind="validated", stage="train", detail=detail))

    def anchor(self) -> list[Sample]:
        """The text that the model must not forget, in pieces; the first ones of a long text."""
        if self.recipe.train.anchor is None:
            return []
        row = Row(self.recipe.train.anchor, 1, {})
        text = Text(load.anchor_text(self.recipe.train.anchor))
        pieces = replace(self.recipe.data, too_long="truncate")
        limit = Limit(min(ANCHOR_TOKENS, Limit.of(self.recipe.train.max_seq_length, self.context).tokens))
        ends = self.tokenizer.eos_token_ids
        return render([(row, text)], inner(self.tokenizer), ends, pieces, limit).samples[:ANCHOR_PIECES]

    def fuse(self) -> str:
        self.base_lm = self.tuned_lm = None
        try:
            original = self.source if self.recipe.fuse.original and self.recipe.quantize is not None else None
            done = fuse(
                self.base,
                self.folder.adapter,
                self.folder.fused,
                self.recipe.fuse,
                self.samples("valid"),
                self.samples("train"),
                original,
                on_phase=self.told,
            )
        except FuseError as error:
            # the folder refuses another recipe, but a model that `fuse` puts there is what the next run goes on with
            paths = f"--model {self.base} --adapter-path {self.folder.adapter} --save-path {self.folder.fused}"
            hint = f"{error.hint}: run `mlxtune fuse {paths} --dequantize`, then this again"
            raise FuseError(error.what, where=error.where, hint=hint) from None
        kept = f"kept {done.kept:.1%} of the gain" if done.kept is not None else "not checked: no validation rows"
        return f"{done.layers} layers, {done.bytes / 1e6:.1f} MB, {kept}"

    def report(self) -> str:
        return str(self.folder.report("html"))


def summary(found: scores.Evaluation) -> str:
    """The main scores in a line."""
    shown = []
    for score in found.scores:
        if score.metric in SHOWN:
            value = f"{score.value:.1%}" if score.unit == "share" else f"{score.value:.3f}"
            shown.append(f"{score.metric.replace('_', ' ')} {value}")
    return f"{', '.join(shown)} on {found.n} rows"

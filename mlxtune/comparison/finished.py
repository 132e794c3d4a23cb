"""A run folder as others compare on it: its base, its rows, and how they become samples. Knows no candidates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune import hub, model, origin
from mlxtune.data import load
from mlxtune.data.files import Row
from mlxtune.data.formats import Example
from mlxtune.data.render import Limit, Rendered, Sample, render
from mlxtune.errors import InputError
from mlxtune.evaluation import labelset
from mlxtune.evaluation.labelset import LabelSet
from mlxtune.model import LanguageModel
from mlxtune.recipe import Recipe
from mlxtune.rundir import RunDir
from mlxtune.tokenizer import inner, load_for_rows

Rows = Sequence[tuple[Row, Example]]
LONGEST = 4096  # tokens of a prompt where a model does not say what it can read


@dataclass(frozen=True, slots=True)
class Asked:
    """How rows are put to one model: its tokenizer, the template in place of its own, and the longest it can read."""

    tokenizer: Any
    template: str | None
    context: int | None

    @staticmethod
    def of(folder: Path, chat_template: str | None) -> "Asked":
        """How to ask the model in a folder. Raises ModelError."""
        config = model.check(folder)
        tokenizer, template = load_for_rows(folder, config, chat_template)
        return Asked(tokenizer, template, model.context_length(config))

    @property
    def room(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.context or LONGEST

    def render(self, rows: Rows, recipe: Recipe, limit: Limit, too_long: str | None = None) -> Rendered:
        """The samples of rows, of which only the answers are scored. Raises DataError."""
        data = replace(recipe.data, mask_prompt=True, too_long=too_long or recipe.data.too_long)
        return render(list(rows), inner(self.tokenizer), self.tokenizer.eos_token_ids, data, limit)


@dataclass(frozen=True, slots=True)
class Finished:
    """A run: its recipe, the (quantized) base in a folder, how it is asked, and its rows by split."""

    run: RunDir
    recipe: Recipe
    base: Path
    asked: Asked
    rows: dict[str, Rows]

    @property
    def limit(self) -> Limit:
        """The longest sample, as in training."""
        return Limit.of(self.recipe.train.max_seq_length, self.asked.context)

    def samples(self, split: str) -> list[Sample]:
        """The samples of a split as the run's own evaluation has them."""
        return self.asked.render(self.rows[split], self.recipe, self.limit).samples

    def groups(self, split: str) -> dict[str, str]:
        """The group of each row by its place, where the recipe says which rows belong together."""
        column = self.recipe.data.group_by
        found = {row.where: load.group_of(row, column) for row, _ in self.rows[split]}
        return {where: str(each[column]) for where, each in found.items() if column in each}

    def label_set(self, asked: Asked | None = None) -> LabelSet | None:
        """The labels that answers choose from, with the tokens of the base or of another model."""
        tokenizer = (asked or self.asked).tokenizer
        ends = tokenizer.eos_token_ids
        return labelset.find(self.rows["train"], self.recipe.evaluate, inner(tokenizer), ends, self.recipe.data)

    def load_base(self) -> LanguageModel:
        return model.load(self.base, chat_template=self.asked.template)


def open_run(
    run: RunDir,
    recipe: Recipe,
    source: Path | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> Finished:
    """A run folder, ready to be compared on. `source` is the original base, found by its name where it is not given.

    Raises InputError for a folder without a run, or without rows to score.
    """
    if not run.recipe.is_file() or not (run.data / "test.jsonl").is_file():
        raise InputError("holds no run", where=run.root, hint="give a folder that `mlxtune run` wrote")
    rows: dict[str, Rows] = {name: load.read_split(run.data, name) for name in ("train", "valid", "test")}
    if not rows["test"]:
        raise InputError("has no test rows to compare on", where=run.data, hint="set data.test above 0 in a new run")
    if run.base.is_dir():
        base = run.base
    elif source is not None:
        base = source
    else:
        base = hub.fetch(recipe.model, recipe.revision or origin.revision(run), on_bytes)
        origin.refuse_changed_model(run, base)
    return Finished(run, recipe, base, Asked.of(base, recipe.data.chat_template), rows)

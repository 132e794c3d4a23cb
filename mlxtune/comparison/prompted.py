"""A run's test rows as they are put to the untuned base: as they are, with a prompt, examples, passages.

Knows rows and the base's tokenizer, not its weights. Where a prompt would be too long for the model's context,
examples or passages are dropped from the end until it fits.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from mlxtune.comparison import candidates, retrieval
from mlxtune.comparison.finished import Finished, Rows
from mlxtune.comparison.retrieval import Index, Passage
from mlxtune.data.files import Row
from mlxtune.data.formats import Example, Text, answer_text, prompt_text
from mlxtune.data.render import Limit, Sample
from mlxtune.data.similar import normalise
from mlxtune.errors import DataError
from mlxtune.recipe import CompareRecipe

CONTEXT = "the model's context of"
T = TypeVar("T")
OnRow = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to ask: its name, what it does in words, the rows as they are asked, and their samples."""

    name: str
    description: str
    rows: Rows
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Plans:
    """The ways that can be asked, the base as it is first; of those that cannot, why."""

    made: list[Plan]
    left_out: dict[str, str]


def plans(finished: Finished, settings: CompareRecipe, on_row: OnRow = lambda what, done, total: None) -> Plans:
    """Every way of `settings` to ask the base. Raises DataError for documents that cannot be read.

    `on_row` is told the way that is made, and of how many rows it is.
    """
    samples = finished.samples("test")
    scored = {sample.where for sample in samples}
    rows = [(row, example) for row, example in finished.rows["test"] if row.where in scored]
    made = [Plan("base", "the base as it is, asked what the row asks", rows, samples)]
    left_out: dict[str, str] = {}
    if all(isinstance(example, Text) for _, example in rows):
        reason = "plain texts ask nothing"
        return Plans(made, dict.fromkeys(("prompt", "few_shot", "retrieval"), reason))
    work = _Work(finished, settings, rows, on_row)
    ways: dict[str, Callable[[], Plan | str]] = {
        "prompt": work.prompt,
        "few_shot": work.few_shot,
        "retrieval": work.retrieval,
    }
    for name, way in ways.items():
        try:
            found = way()
        except DataError as error:
            if error.where is not None and error.where not in scored:
                raise  # the documents, not a row
            found = f"{error.where}: {error.what}"
        if isinstance(found, Plan):
            made.append(found)
        else:
            left_out[name] = found
    return Plans(made, left_out)


class _Work:
    """What the ways to ask have in common."""

    def __init__(self, finished: Finished, settings: CompareRecipe, rows: Rows, on_row: OnRow):
        self.finished, self.settings, self.rows, self.on_row = finished, settings, rows, on_row
        self.train = [pair for pair in finished.rows["train"] if answer_text(pair[1]) is not None]
        self.answers = [answer_text(example) for _, example in self.train]
        self.label = finished.recipe.evaluate.label
        self.system = True

    def prompt(self) -> Plan | str:
        own = self.settings.prompt
        labels, alone = candidates.labels_of(self.answers, self.label)
        text = own if own is not None else candidates.label_prompt(labels, alone=alone)
        if text is None:
            return "compare.prompt is not set, and the answers give no labels to name"
        self.system = self._knows_system(text)
        rows = [(row, self._prompted(example, text, row.where)) for row, example in self.rows]
        what = "with the recipe's prompt" if own is not None else "with a prompt that names the labels"
        return self._plan("prompt", f"the base {what}", rows)

    def _knows_system(self, prompt: str) -> bool:
        """Whether the chat template takes a system message."""
        row, example = self.rows[0]
        try:
            self._samples([(row, candidates.with_prompt(example, prompt, row.where))])
        except DataError:
            return False
        return True

    def _prompted(self, example: Example, prompt: str | None, where: str) -> Example:
        return example if prompt is None else candidates.with_prompt(example, prompt, where, system=self.system)

    def few_shot(self) -> Plan | str:
        count = min(self.settings.few_shot, len(self.train))
        if count == 0:
            return "compare.few_shot is 0" if self.train else "no training row has an answer"
        fixed = candidates.fixed_examples(self.answers, len(self.train), self.label, self.finished.recipe.seed)
        texts = [normalise(retrieval.row_text(example)) for _, example in self.train]
        nearest = self.settings.examples == "nearest"
        index = Index(retrieval.of_rows(self.train), questions=True) if nearest else None

        def chosen(example: Example) -> list[Example]:
            itself = _itself(example)
            places = index.search(prompt_text(example), count, itself) if index is not None else []
            more = (place for place in fixed if place not in places and texts[place] not in itself)
            return [self.train[place][1] for place in [*places, *islice(more, count - len(places))]]

        rows, counts = self._fitted("few_shot", candidates.with_examples, chosen)
        how = "like the one asked" if nearest else "the same for all"
        what = f"the base shown {_counted(count, 'training row')}, {how}, as examples"
        return self._plan("few_shot", f"{what}{_fewer(counts, count)}", rows)

    def retrieval(self) -> Plan | str:
        if not self.settings.retrieval:
            return "compare.retrieval is off"
        documents = self.settings.documents
        found = retrieval.of_folder(documents) if documents is not None else retrieval.of_rows(self.train)
        passages = self._readable(found)
        if not passages:
            return "there is nothing to retrieve from"
        index, count = Index(passages), self.settings.passages

        def chosen(example: Example) -> list[str]:
            return [passages[place].text for place in index.search(prompt_text(example), count, _itself(example))]

        rows, counts = self._fitted("retrieval", candidates.with_passages, chosen)
        origin = (
            f"{_counted(len(passages), 'passage')} of {documents}" if documents is not None else "the training rows"
        )
        what = f"the base with up to {_counted(count, 'passage')} found by BM25 in {origin}"
        return self._plan("retrieval", f"{what}{_fewer(counts, count)}", rows)

    def _readable(self, passages: Sequence[Passage]) -> list[Passage]:
        """Those without a text that the tokenizer reads as a control token."""
        known = self.finished.asked.tokenizer.added_tokens_decoder.values()
        controls = [str(token) for token in known if token.special]
        return [each for each in passages if not any(control in each.text for control in controls)]

    def _fitted(
        self, name: str, add: Callable[[Example, Sequence[T]], Example], chosen: Callable[[Example], list[T]]
    ) -> tuple[Rows, list[int]]:
        """The rows, each with as much of what is chosen for it as the context takes, and how much that is."""
        rows, counts = [], []
        for row, example in self.rows:
            asked = self._prompted(example, self.settings.prompt, row.where)
            shown = [] if isinstance(example, Text) else chosen(example)

            def fits(count: int, row: Row = row, asked: Example = asked, shown: list[T] = shown) -> bool:
                return self._fits(self._samples([(row, add(asked, shown[:count]))]))

            whole = not shown or fits(len(shown))
            most = len(shown) if whole else bisect_left(range(1, len(shown)), True, key=lambda count: not fits(count))
            counts.append(most)
            rows.append((row, add(asked, shown[:most])))
            self.on_row(f"{name}, rows ", len(rows), len(self.rows))
        return rows, counts

    def _fits(self, samples: list[Sample]) -> bool:
        """Whether rows fit into the context with an answer as long as may be given."""
        longest = self.finished.recipe.evaluate.max_tokens
        room = self.finished.asked.room
        return bool(samples) and all(sample.prompt_length + longest <= room for sample in samples)

    def _samples(self, rows: Rows) -> list[Sample]:
        limit = Limit(self.finished.asked.room, CONTEXT)
        return self.finished.asked.render(rows, self.finished.recipe, limit, "drop").samples

    def _plan(self, name: str, description: str, rows: Rows) -> Plan | str:
        samples = self._samples(rows)
        if not samples:
            return "no row fits into the model's context"
        lost = len(rows) - len({sample.where for sample in samples})
        left = f"; {_counted(lost, 'row')} too long for its context, not scored" if lost else ""
        return Plan(name, f"{description}{left}", rows, samples)


def _itself(example: Example) -> set[str]:
    return {normalise(retrieval.row_text(example))}


def _fewer(counts: Sequence[int], wanted: int) -> str:
    fewer = [count for count in counts if count < wanted]
    return (
        f" (fewer in {len(fewer)} of {len(counts)} rows, {sum(counts) / len(counts):.1f} on average)" if fewer else ""
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

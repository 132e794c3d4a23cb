"""The set of labels that answers choose from, and the tokens with which a model would give each.

Knows rows and a tokenizer, not a network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.files import Row
from mlxtune.data.formats import Chat, Completion, Example, Text, answer_text, last_learned
from mlxtune.data.labels import MOST_ANSWERS, find_labels, label_in, label_span
from mlxtune.data.render import Limit, Sample, render
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe, EvaluateRecipe

ANY_LENGTH = Limit(1 << 30)
Render = Callable[[Row, Example], list[Sample]]


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels, each with the tokens (at least one) that give it as an answer's beginning.

    `pattern` finds a label in an answer; without one the whole answer is it. Where answers are nothing but a label
    the tokens end with the one that ends a turn.
    """

    labels: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    pattern: str | None


def label_of(answer: str | None, pattern: str | None) -> str | None:
    """The label in an answer; without a pattern the whole answer, white space around it aside."""
    if answer is None or pattern is not None:
        return label_in(answer, pattern) if pattern is not None else None
    return answer.strip()


def find(
    rows: Sequence[tuple[Row, Example]],
    settings: EvaluateRecipe,
    tokenizer: Any,
    ends: set[int],
    data: DataRecipe,
) -> LabelSet | None:
    """The labels of `rows`, best those of training, or `settings.labels`; None where labels cannot be scored so.

    `settings.label` finds a label in an answer; without it, an answer is a label where the answers of `rows` are at
    most 200 different lines in many rows. A label is scored as it stands in an answer: with the text before it, and
    with the end of the answer where answers are nothing but labels. It is rendered behind a prompt of `rows`, so its
    tokens are those of training. They can be scored so where that text is the same in all answers, and there are 2
    to 200 labels (or as many as `settings.labels` names). `tokenizer` and `ends` as for `render`.
    """
    answers = {place: answer for place, (_, each) in enumerate(rows) if (answer := answer_text(each)) is not None}
    labels, pattern = _labels(list(answers.values()), settings)
    if len(labels) < 2 or (len(labels) > MOST_ANSWERS and not settings.labels):
        return None
    around = {(answer[: span[0]], answer[span[1] :].strip()) for answer, span in _spans(answers.values(), pattern)}
    before = {start for start, _ in around}
    if len(before) != 1:
        return None
    whole = all(not rest for _, rest in around)
    place = min(answers, key=lambda place: len(str(rows[place][1])))
    row, example = rows[place]
    fitting = replace(data, mask_prompt=True, learn="last", too_long="error")
    (start,) = before
    found = []
    for label in labels:
        try:
            samples = render([(row, answered(example, start + label))], tokenizer, ends, fitting, ANY_LENGTH).samples
        except DataError:  # a label that cannot be rendered exactly, such as the text of a control token
            return None
        found.append(_continuation(samples[-1], whole) if samples else ())
    different = all(found) and len(set(found)) == len(found)
    return LabelSet(tuple(labels), tuple(found), pattern) if different else None


def _labels(answers: list[str], settings: EvaluateRecipe) -> tuple[list[str], str | None]:
    """The labels, sorted, and the pattern that finds them; none where answers are no labels."""
    if settings.labels:
        return sorted(set(settings.labels)), settings.label
    found = find_labels(answers, settings.label) or []
    if settings.label is None and any("\n" in answer.strip() for answer in answers):
        return [], None
    return sorted({label for label in found if label}), settings.label


def _spans(answers: Any, pattern: str | None) -> Iterator[tuple[str, tuple[int, int]]]:
    for answer in answers:
        span = label_span(answer, pattern) if pattern is not None else (0, len(answer))
        if span is not None:
            yield answer, span


def answered(example: Example, answer: str) -> Example:
    """An example with another last answer; what comes behind that is gone."""
    if isinstance(example, Text):
        return example
    if isinstance(example, Completion):
        return Completion(example.prompt, answer)
    last = last_learned(example)
    return Chat([*example.messages[:last], {"role": "assistant", "content": answer}], example.tools)


def _continuation(sample: Sample, whole: bool) -> tuple[int, ...]:
    """The tokens of a sample's answer, with the one that ends it where the answer is the `whole` label."""
    last = max(place for place, trained in enumerate(sample.trained) if trained)
    return tuple(sample.tokens[sample.prompt_length : last + whole])

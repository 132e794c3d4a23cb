"""Was tuning worth it, against prompts, examples and retrieval? One decision by stated rules. Knows scores, not files.

U is the best untuned candidate and T the best tuned one by the metric that all are compared by; of equals the one
listed first. A difference is clear where its p-value, adjusted for all comparisons with U (Holm), is below 0.05.

1. Without scores of a U and a T on the same rows, or where neither gets 5 % of the rows right: `cannot_tell`.
2. T is clearly better than U: `tune`. What was forgotten beyond the budget is said in the same breath. But where an
   untuned candidate that is held to the labels, by their probabilities, is as good as T, which may be held to them
   too: `prompt`; and where it is worse, but the two intervals overlap: `cannot_tell`. Where nothing is left of the gain
   without the test rows that are near training rows: `cannot_tell`.
3. Else it is settled that tuning brings nothing if T is clearly worse, or if the interval leaves it no more than 5
   points (0.05 nats for losses) to gain, or if U is at 95 % or more, of which its interval leaves 90 %. An interval of
   fewer rows than could show any difference settles nothing. Not settled: `cannot_tell`, with the rows that would do.
4. Settled, and U is retrieval and clearly better than each other untuned candidate: `retrieve`.
5. Settled otherwise: `prompt`, the simplest untuned candidate being as good as tuning.

Of a candidate that could not read all rows, those that it lacks count as wrong where U and T are chosen; by a loss it
comes after those that read all. U is the best of several by its score on these rows, which flatters it a little: the
rules lean against tuning.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.report.score import Score
from mlxtune.report.words import figure, metric_name, number

TUNE, PROMPT, RETRIEVE, CANNOT_TELL = "tune", "prompt", "retrieve", "cannot_tell"
IN_SHORT = {
    TUNE: "tuning is worth it",
    PROMPT: "a prompt is enough",
    RETRIEVE: "retrieval suits these rows better",
    CANNOT_TELL: "cannot tell yet",
}
LEVEL = 0.05
MARGIN = 0.05  # points of a share, or nats per token: a gain below it is not worth a training
CEILING, CEILING_LOW = 0.95, 0.9
FLOOR = 0.05
HELD = "label_accuracy"
NAMES = {
    "base": "the base model as it is",
    "prompt": "the base model with a prompt",
    "few_shot": "the base model with examples in its prompt",
    "retrieval": "the base model with retrieved passages",
    "tuned": "the tuned model",
    "fused": "the fused model",
}

Candidate = Mapping[str, Any]


def decide(
    candidates: Sequence[Candidate],
    metric: str | None,
    forgetting: Mapping[str, Any] | None,
    contamination: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The verdict of a comparison: `decision`, `sentence`, `reasons` and `rows_needed`.

    `candidates`, `forgetting` and `contamination` are as in compare.json. A `difference` is that of a candidate from U.
    """
    scored = [each for each in candidates if _score(each, metric) is not None]
    untuned = _best([each for each in scored if each["kind"] == "untuned"], metric)
    tuned = _best([each for each in scored if each["kind"] == "tuned"], metric)
    if metric is None or untuned is None or tuned is None or tuned["difference"] is None:
        lacking = "no tuned model" if tuned is None else "no untuned model" if untuned is None else "no common rows"
        return _verdict(CANNOT_TELL, f"Cannot tell: {lacking} was scored to compare.", [])
    case = _Case(metric, scored, untuned, tuned, forgetting, contamination)
    if case.useless:
        what = f"neither {_name(untuned)} nor {_name(tuned)} does these rows"
        advice = "train longer, start from a larger base, or look at the rows"
        return _verdict(CANNOT_TELL, f"Cannot tell: {what} ({case.figures()}); {advice}.", [])
    if case.clear > 0:
        return case.tune_or_labels()
    if not case.settled:
        rows = case.rows_needed()
        label = f"label about {_counted(_rounded(rows - case.u.n), 'more ')}"
        sentence = f"Cannot tell yet on {_counted(case.u.n)}: {case.figures()}, {case.gain()}; {label}."
        return _verdict(CANNOT_TELL, sentence, case.reasons(), rows)
    if untuned["name"] == "retrieval" and case.retrieval_leads():
        sentence = f"Retrieval suits these rows better than tuning: {case.figures()}, {case.gain()}."
        return _verdict(RETRIEVE, sentence, case.reasons())
    start = "No tuning is needed" if untuned["name"] == "base" else f"No need to tune: {_name(untuned)} is enough"
    return _verdict(PROMPT, f"{start}: {case.figures()}, {case.gain()}.", case.reasons())


class _Case:
    """U and T, and what the rules ask of them."""

    def __init__(
        self,
        metric: str,
        scored: Sequence[Candidate],
        untuned: Candidate,
        tuned: Candidate,
        forgetting: Mapping[str, Any] | None,
        contamination: Mapping[str, Any] | None,
    ):
        u, t = _score(untuned, metric), _score(tuned, metric)
        assert u is not None
        assert t is not None
        self.scored, self.untuned, self.tuned, self.forgetting = scored, untuned, tuned, forgetting
        self.u, self.t, self.metric = u, t, metric
        self.way = 1 if u.better == "higher" else -1
        self.difference: Mapping[str, Any] = tuned["difference"]
        self.near = int(contamination["count"]) if contamination is not None else 0
        self.without = {each["name"]: _score(each, metric) for each in (contamination or {}).get("without", ())}

    @property
    def useless(self) -> bool:
        return self.u.unit == "share" and self.way > 0 and max(self.u.value, self.t.value) < FLOOR

    @property
    def clear(self) -> int:
        """1 where T is clearly better than U, -1 where it is clearly worse, else 0."""
        return _clear(self.difference, self.way)

    @property
    def most_gain(self) -> float:
        """What the interval leaves tuning to gain."""
        return self.way * float(self.difference["ci_high" if self.way > 0 else "ci_low"])

    @property
    def near_ceiling(self) -> bool:
        return self.u.unit == "share" and self.way > 0 and self.u.value >= CEILING and self.u.ci_low >= CEILING_LOW

    @property
    def settled(self) -> bool:
        return self.clear < 0 or (self.told and self.most_gain <= MARGIN) or self.near_ceiling

    @property
    def told(self) -> bool:
        """Whether the interval says something: one without width stands on one row or group, or on rows all equal."""
        low, high, value = (self.difference[name] for name in ("ci_low", "ci_high", "value"))
        return self.u.n >= self.least and (low < high or value == 0)

    @property
    def least(self) -> int:
        """The rows that can show a difference at all.

        Of n rows that all speak for tuning, p is 2^(1 - n), and this times the comparisons must be below the level.
        """
        return math.floor(1 - math.log2(LEVEL / self.comparisons)) + 1

    @property
    def comparisons(self) -> int:
        """How many candidates are compared with U."""
        return sum(each["difference"] is not None for each in self.scored)

    def retrieval_leads(self) -> bool:
        others = [each for each in self.scored if each["kind"] == "untuned" and each is not self.untuned]
        return all(each["difference"] is not None and _clear(each["difference"], self.way) < 0 for each in others)

    def rows_needed(self) -> int:
        """The rows that would do: to show the gain, or that there is none above the margin.

        For the latter the interval's half, which shrinks with the root of the rows, has to fit between the difference
        and the margin: n · (half / (margin - gain))².
        """
        gain = self.way * float(self.difference["value"])
        if gain > 0:
            needed: int | None = self.difference["rows_needed"]
        else:
            needed = math.ceil(self.u.n * ((self.most_gain - gain) / (MARGIN - gain)) ** 2)
        return max(needed or 0, self.least, self.u.n + 1)

    def figures(self) -> str:
        name, tuned, untuned = metric_name(self.metric), _name(self.tuned), _name(self.untuned)
        return f"{name} {figure(self.t)} by {tuned}, {figure(self.u)} by {untuned}"

    def gain(self) -> str:
        return f"a difference of {_change(self.difference, self.u.unit)}"

    def tune_or_labels(self) -> dict[str, Any]:
        """Rule 2."""
        if self.near and not self._gains_without_near():
            sentence = f"Cannot tell yet: {self.figures()}, but {self._near()}; test on rows that are not in training."
            return _verdict(CANNOT_TELL, sentence, self.reasons())
        rival = self._held_to_labels()
        own = _score(self.tuned, HELD)
        top = own if own is not None and own.value > self.t.value else self.t
        if rival is None or rival[1].ci_high < top.ci_low:
            return _verdict(TUNE, self._tune_sentence(), self.reasons())
        name, score = _name(rival[0]), rival[1]
        labels = f"held to the labels by their probabilities, {name} is right in {figure(score)}"
        tuned = f"{figure(top)} by {_name(self.tuned)}{', held to them too' if top is own else ''}"
        if score.value >= top.value:
            return _verdict(PROMPT, f"No need to tune: {labels}, against {tuned}.", self.reasons())
        return _verdict(
            CANNOT_TELL, f"Cannot tell yet on {_counted(self.u.n)}: {labels}, against {tuned}.", self.reasons()
        )

    def _held_to_labels(self) -> tuple[Candidate, Score] | None:
        """The untuned candidate that finds the right label likeliest most often, where labels are compared."""
        if self.metric != "accuracy":
            return None
        untuned = [each for each in self.scored if each["kind"] == "untuned"]
        known = [each for each in untuned if _score(each, HELD) is not None]
        found = _best(known, HELD)
        score = _score(found, HELD) if found is not None else None
        return (found, score) if found is not None and score is not None else None

    def _tune_sentence(self) -> str:
        price = ", but more was forgotten than the budget allows" if self._forgotten() is not None else ""
        return f"Tuning is worth it on {_counted(self.u.n, 'held-out ')}: {self.figures()}, {self.gain()}{price}."

    def reasons(self) -> list[str]:
        """Why, a line each: what the rules looked at."""
        p, compared = self.difference["p_adjusted"], self.comparisons
        times = f" after adjusting for {compared} comparisons" if compared > 1 else ""
        clear = "below" if p < LEVEL else "not below"
        found = [f"p {_p(p)}{times}, {clear} {LEVEL}"]
        if self.clear <= 0:
            left = f"the interval leaves tuning {_amount(max(0.0, self.most_gain), self.u.unit)} to gain"
            compared_to = "no more than" if self.most_gain <= MARGIN else "more than"
            found.append(f"{left}, {compared_to} the {_amount(MARGIN, self.u.unit)} that count")
            if self.near_ceiling:
                found.append(f"{_name(self.untuned)} is near the ceiling at {figure(self.u)}")
        rival = self._held_to_labels()
        if rival is not None:
            found.append(f"held to the labels by their probabilities, {_name(rival[0])} is right in {figure(rival[1])}")
        if self.near:
            found.append(self._near())
        found += self._costs()
        forgot = self._forgotten()
        if forgot is not None:
            found.append(forgot)
        elif self.forgetting is not None:
            found.append(f"{self._rise()}, within the budget of {number(self.forgetting['budget'])}")
        return found

    def _gains_without_near(self) -> bool:
        u, t = (self.without.get(each["name"]) for each in (self.untuned, self.tuned))
        return u is not None and t is not None and self.way * (t.value - u.value) > 0

    def _near(self) -> str:
        """What is left without the test rows that are near training rows."""
        rows = f"{_counted(self.near, 'test ')} {'is' if self.near == 1 else 'are'} near training rows"
        u, t = (self.without.get(each["name"]) for each in (self.untuned, self.tuned))
        if u is None or t is None:
            return f"{rows}, and no others tell the two apart"
        return f"{rows}; without them {metric_name(self.metric)} is {figure(t)} and {figure(u)}"

    def _costs(self) -> list[str]:
        untuned, tuned = (each["cost"].get("prompt_tokens") for each in (self.untuned, self.tuned))
        if not untuned or not tuned or untuned < 1.5 * tuned:
            return []
        return [f"{_name(self.untuned)} reads {untuned:.0f} tokens a row, {_name(self.tuned)} {tuned:.0f}"]

    def _forgotten(self) -> str | None:
        """What was forgotten, where it is more than the budget."""
        found = self.forgetting
        if found is None or found["tuned_loss"] - found["base_loss"] <= found["budget"]:
            return None
        return f"{self._rise()}, more than the budget of {number(found['budget'])}"

    def _rise(self) -> str:
        assert self.forgetting is not None
        rise = self.forgetting["tuned_loss"] - self.forgetting["base_loss"]
        verb = "rose" if rise >= 0 else "fell"
        return f"the loss on the anchor {verb} by {number(abs(rise))} nats per token"


def _verdict(decision: str, sentence: str, reasons: list[str], rows: int | None = None) -> dict[str, Any]:
    return {"decision": decision, "sentence": sentence, "reasons": reasons, "rows_needed": rows}


def _score(candidate: Candidate, metric: str | None) -> Score | None:
    return next((Score(**each) for each in candidate["scores"] if each["metric"] == metric), None)


def _best(candidates: Sequence[Candidate], metric: str | None) -> Candidate | None:
    found = [(each, score) for each in candidates if (score := _score(each, metric)) is not None]
    rows = max((score.n for _, score in found), default=0)

    def rank(pair: tuple[Candidate, Score]) -> float:
        score = pair[1]
        if score.better == "higher":
            return score.value * score.n / rows
        return -score.value if score.n == rows else -math.inf

    return max(found, key=rank, default=(None, None))[0]


def best(candidates: Sequence[Candidate], metric: str, kind: str) -> str | None:
    """The name of the best of a kind, `untuned` (U) or `tuned` (T), by the metric; the first of equals."""
    scored = [each for each in candidates if each["kind"] == kind and _score(each, metric) is not None]
    found = _best(scored, metric)
    return found["name"] if found is not None else None


def _clear(difference: Mapping[str, Any], way: int) -> int:
    if difference["p_adjusted"] >= LEVEL:
        return 0
    return 1 if way * difference["value"] > 0 else -1


def _name(candidate: Candidate) -> str:
    name: str = candidate["name"]
    return NAMES.get(name, name)


def _change(difference: Mapping[str, Any], unit: str) -> str:
    """`+12.3 points (95 % interval +4.1 to +20.2)`."""
    value, low, high = (difference[name] for name in ("value", "ci_low", "ci_high"))
    if unit == "share":
        return f"{value * 100:+.1f} points (95 % interval {low * 100:+.1f} to {high * 100:+.1f})"
    return f"{value:+.3f} {unit} (95 % interval {low:+.3f} to {high:+.3f})".replace("  ", " ")


def _amount(value: float, unit: str) -> str:
    return f"{value * 100:.3g} points" if unit == "share" else f"{value:.3g} {unit}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _counted(rows: int, kind: str = "") -> str:
    return f"{rows:,} {kind}{'row' if rows == 1 else 'rows'}"


def _rounded(rows: int) -> int:
    """Two digits: more would promise too much."""
    digits = max(0, len(str(rows)) - 2)
    return int(math.ceil(rows / 10**digits) * 10**digits)

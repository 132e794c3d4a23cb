"""Answers unlike most others in form: language, length, refusals, open brackets, broken JSON. Knows no content.

Each check compares answers with the other answers of the set: what most of them do is the style, not a mistake.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator

from mlxtune.data.audit.entries import Entry, Table, labelled
from mlxtune.data.audit.findings import Finding, about_rows, quoted
from mlxtune.data.audit.language import language_of
from mlxtune.data.audit.lengths import percentile

FEWEST = 5  # answers from which a style is told
MOST = 0.8  # share of answers that makes a style
ODD = 0.1  # share of answers up to which something is odd, not usual
LONG_WORDS = 8  # in the middle answer, among which one word is odd

_APOSTROPHE = str.maketrans("’", "'")
_AS_AN_AI = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:ai |large )?language model|(?:virtual |ai )assistant)\b"
    r"|\bi(?:'m| am) (?:just |only )?an? (?:ai\b|artificial intelligence|(?:large )?language model)"
    r"|\bmy (?:knowledge cutoff|training data)\b"
    r"|\bi (?:do not|don't) have (?:personal (?:opinions|feelings|experiences)|(?:access to )?real-time)",
    re.I,
)
_REFUSAL = re.compile(
    r"\A\W*(?:(?:i(?:'m| am) (?:very |so |really )?(?:sorry|afraid)|(?:sorry|apologies|unfortunately)|i apologi[sz]e)"
    r"\b[^.!?\n]{0,40}\bi(?:'m| am)? ?(?:can ?not|can't|could not|couldn't|won't|will not|not able to|unable to)"
    r"|i (?:can ?not|can't|won't|will not|am unable to|am not able to) "
    r"(?:assist|help|provide|comply|fulfil|answer|engage|create|generate|write|discuss|support|do that)"
    r"|i(?:'m| am) (?:unable|not able) to (?:assist|help|provide|comply|fulfil|answer|engage|create|generate|write))\b",
    re.I,
)
# what looks like a bracket or quote and is none: smileys, inches; and `1)` or `a)`, where nothing is open
_LOOSE = re.compile(r"[:;=][-']?[()\[\]]+(?=\s|\Z)|(?<=\d)\"(?!\S)")
_MARKER = re.compile(r"(?:\A|[\s,;:*_])(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\Z")
_PAIRS = {")": "(", "]": "[", "}": "{"}
_BRACKET = re.compile(r"[()\[\]{}]")
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.S)


def style_checks(table: Table) -> Iterator[Finding]:
    """Findings about the form of the answers; labels have none."""
    answered = [(entry, entry.answer) for entry in table.entries if entry.answer is not None]
    if len(answered) < FEWEST:
        return
    broken = _broken_json(answered)
    checks = [_BOILERPLATE, _REFUSALS]
    if broken is None:
        checks += [_LANGUAGES, _ENDS] if labelled(table.entries) else [_LANGUAGES, _SHORT, _ENDS]
    elif broken:
        detail = "no valid JSON, as most answers are"
        yield about_rows("style", "warning", broken, detail, "correct them", places=table.places)
    for find, severity, detail, advice in checks:
        noted = find(answered)
        if noted:
            yield about_rows("style", severity, noted, detail, advice, places=table.places)


Answered = list[tuple[Entry, str]]
Noted = list[tuple[Entry, str]]


def _broken_json(answered: Answered) -> Noted | None:
    """Answers that are no JSON where most are objects or lists; None where most are something else."""
    if sum(answer.lstrip()[:1] in ("{", "[", "`") for _, answer in answered) < len(answered) / 2:
        return None
    reasons = [(entry, _json_mistake(answer)) for entry, answer in answered]
    broken = [(entry, reason) for entry, reason in reasons if reason is not None]
    valid = len(answered) - len(broken)
    return broken if valid >= FEWEST and valid >= MOST * len(answered) else None


def _json_mistake(answer: str) -> str | None:
    """Why an answer is no JSON object or list; None where it is one."""
    fenced = _FENCE.match(answer)
    try:
        value = json.loads(fenced.group(1) if fenced else answer)
    except json.JSONDecodeError as error:
        return f"{error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:
        return str(error)
    return None if isinstance(value, dict | list) else "neither an object nor a list"


def _boilerplate(answered: Answered) -> Noted:
    return [(entry, quoted(found[0])) for entry, answer in answered if (found := _search(_AS_AN_AI, answer))]


def _refusals(answered: Answered) -> Noted:
    found = [(entry, answer) for entry, answer in answered if _search(_REFUSAL, answer)]
    return [(entry, quoted(answer.strip())) for entry, answer in found if not _search(_AS_AN_AI, answer)]


def _search(pattern: re.Pattern[str], answer: str) -> re.Match[str] | None:
    return pattern.search(answer.translate(_APOSTROPHE) if "’" in answer else answer)


def _other_languages(answered: Answered) -> Noted:
    """Answers in another language than most of those whose language can be told."""
    languages = [(entry, language_of(answer)) for entry, answer in answered]
    counts = Counter(language for _, language in languages if language is not None)
    if not counts:
        return []
    usual, most = counts.most_common(1)[0]
    if most < FEWEST or most < MOST * counts.total():
        return []
    odd = [(entry, language) for entry, language in languages if language not in (None, usual)]
    return [
        (entry, f"probably {language}" + (", like its prompt" if language_of(entry.prompt) == language else ""))
        for entry, language in odd
    ]


def _short_ones(answered: Answered) -> Noted:
    """Answers of one word where most are sentences; those of one letter are a finding about lengths."""
    words = [answer.split(maxsplit=LONG_WORDS) for _, answer in answered]
    if percentile(sorted(map(len, words)), 50) < LONG_WORDS:
        return []
    short = [
        (entry, quoted(each[0]))
        for (entry, _), each in zip(answered, words, strict=True)
        if len(" ".join(each)) > 1 and len(each) == 1
    ]
    return short if len(short) <= ODD * len(answered) else []


def _open_ends(answered: Answered) -> Noted:
    """Answers with a quote or bracket that is not closed, or not opened."""
    found = [(entry, open_end) for entry, answer in answered if (open_end := unbalanced(answer)) is not None]
    return found if len(found) <= ODD * len(answered) else []


def unbalanced(text: str) -> str | None:
    """What stands alone of a text's brackets and double quotes; None where all are closed."""
    if not any(character in text for character in '()[]{}"“”„«»'):
        return None
    text = _LOOSE.sub(" ", text)
    open_ones: list[str] = []
    for found in _BRACKET.finditer(text):
        bracket = found[0]
        if bracket not in _PAIRS:
            open_ones.append(bracket)
        elif open_ones:
            if open_ones.pop() != _PAIRS[bracket]:
                return f"a `{bracket}` too many"
        elif bracket != ")" or not _MARKER.search(text[max(0, found.start() - 6) : found.start()]):
            return f"a `{bracket}` too many"
    if open_ones:
        return f"`{open_ones[-1]}` is not closed"
    if text.count('"') % 2:
        return 'an odd number of `"`'
    if "„" not in text and text.count("“") != text.count("”"):
        return "`“` and `”` do not match"
    return "`«` and `»` do not match" if text.count("«") != text.count("»") else None


Check = tuple[Callable[[Answered], Noted], str, str, str]
_BOILERPLATE: Check = (
    _boilerplate, "warning", "an assistant's boilerplate in the answer", "rewrite them: the model will talk like this",
)  # fmt: skip
_REFUSALS: Check = (
    _refusals, "warning", "the answer refuses", "keep only the refusals that the model is to learn",
)  # fmt: skip
_LANGUAGES: Check = (
    _other_languages, "info", "in another language than most answers", "translate them, or leave them out",
)  # fmt: skip
_SHORT: Check = (_short_ones, "info", "one word, where most answers are sentences", "write them out as the others")
_ENDS: Check = (
    _open_ends, "info", "a quote or bracket is not closed: the answer may be cut off", "complete them",
)  # fmt: skip

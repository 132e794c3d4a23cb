"""Answers that hold facts which move: prices, dates, versions, stock. Knows their shapes, not whether they are true.

What the prompt gives is no fact to remember, and sums are no prices: a worked calculation is left alone.
"""

import re
from collections import Counter
from collections.abc import Iterator

from mlxtune.data.audit.entries import Entry, Table, labelled
from mlxtune.data.audit.findings import Finding, about_rows, quoted

MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    "|nov(?:ember)?|dec(?:ember)?"
)
DAYS = "mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun"
YEAR = r"20[1-4]\d"  # older ones are history, which stays
PRODUCTS = "python|node(?:\\.js)?|ios|ipados|android|macos|ubuntu|debian|windows|java|php|ruby|firefox|chrome|cuda"
KINDS = {
    "price": re.compile(
        r"(?:[$€£¥₹]|\b(?:usd|eur|gbp|chf) )\s?\d(?:[\d.,]*\d)?"
        r"|\b\d(?:[\d.,]*\d)?\s?(?:[€£]|(?:usd|eur|gbp|chf|dollars|euros|pounds)\b)",
        re.I,
    ),
    "date": re.compile(
        rf"\b(?:{MONTHS})\.? \d{{1,2}}(?:st|nd|rd|th)?,? {YEAR}\b"
        rf"|\b\d{{1,2}}(?:st|nd|rd|th|\.)? (?:{MONTHS}),? {YEAR}\b"
        rf"|\b{YEAR}-[01]\d-[0-3]\d\b|\b\d{{1,2}}([./])\d{{1,2}}\1{YEAR}\b|\bas of (?:{MONTHS}|today|now|{YEAR})"
        rf"|\b(?:until|by|from|before|after|since|deadline:?) (?:the )?(?:(?:{MONTHS})\.? \d{{1,2}}\b"
        rf"|\d{{1,2}}(?:st|nd|rd|th)? (?:of )?(?:{MONTHS})\b)",
        re.I,
    ),
    "version": re.compile(
        rf"\b(?:version|release|v)\.? ?\d+(?:\.\d+)*\b|\b(?:{PRODUCTS}) \d+(?:\.\d+)*\b"
        r"|(?<![\d.])\d+\.\d+\.\d+(?!\.?\d)",
        re.I,
    ),
    "stock": re.compile(
        r"\b(?:in|out of) stock\b|\bsold out\b|\b(?:currently|now|temporarily|no longer) (?:un)?available\b"
        r"|\bonly \d+ (?:left|remaining)\b|\bback-?order|\bpre-?order"
        r"|\b\d+ (?:units|pieces|seats|rooms) (?:left|available)",
        re.I,
    ),
    "opening hours": re.compile(
        r"\bopen\b[^.\n]{0,40}\b\d{1,2}(?::\d\d)? ?(?:a\.?m|p\.?m|o'clock)"
        rf"|\b(?:{DAYS})(?:day)?s?\b ?(?:to|through|-|–) ?(?:{DAYS})[^.\n]{{0,30}}\b\d{{1,2}}(?::\d\d)? ?[ap]\.?m",
        re.I,
    ),
}
# a sum: digits, a sign, digits; or `=` before a number; and queries and code, whose numbers mean something else
_CALCULATION = re.compile(r"\d ?[%)]? ?[-+*/×÷x] ?[$€£(]? ?\d[\d.,]* ?=|= ?[$€£]? ?\d|<<")
_CODE = re.compile(r"\A\s*(?:select|insert|update|create|with)\b|```|\bdef \w+\(|\bimport \w+", re.I)
_HINT = re.compile(r"[\d]|stock|sold|available|order", re.I)


def stale_facts(table: Table) -> Iterator[Finding]:
    """One finding for all kinds of facts that move."""
    if labelled(table.entries) and table.pattern is None and not _long_answers(table.entries):
        return
    noted = [(entry, f"{found[0]}: {quoted(found[1])}") for entry in table.entries if (found := fact_in(entry))]
    if noted:
        counts = Counter(note.split(":")[0] for _, note in noted)
        named = ", ".join(f"{count:,} × {kind}" for kind, count in counts.most_common())
        detail = f"facts that move, in the answer: {named}"
        advice = "let the model look such facts up (retrieval) when it answers; tuned in, they grow stale"
        yield about_rows("stale_fact", "info", noted, detail, advice, places=table.places)


def _long_answers(entries: list[Entry]) -> bool:
    return any("\n" in (entry.answer or "") for entry in entries)


def fact_in(entry: Entry) -> tuple[str, str] | None:
    """The kind and the words of the first fact in an answer that may be another tomorrow."""
    answer = entry.answer
    if answer is None or not _HINT.search(answer) or _CALCULATION.search(answer) or _CODE.search(answer):
        return None
    for kind, pattern in KINDS.items():
        for found in pattern.finditer(answer):
            if found[0].casefold() not in entry.prompt.casefold():
                return kind, found[0]
    return None

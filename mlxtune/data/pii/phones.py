"""Phone numbers, by their form or by the words beside them. Knows no numbering plan but the North American one."""

import re
from collections.abc import Iterator

# 7 digits or more with single separators, and an extension
_NUMBER = re.compile(
    r"(?<![\w/#$€£])(?<!\d[.,])(?<!\w[-.])(?:\+ ?|\(\+?)?\d(?:[ ().\-/]{0,2}\d){6,14}"
    r"(?P<extension>,? ?(?:x|ext\.?|extension) ?\d{1,6})?(?![\w/])(?![.,-]\d)",
    re.I,
)
_NORTH_AMERICAN = re.compile(r"(?:(?:\+?|00)1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}")
_TRUNK = re.compile(r"(?:\(0[1-9]\d{0,4}\) ?|00?[1-9]\d{0,4}[ ./-]{1,2})\d{2,8}(?:[ .-]?\d{2,8}){0,4}")  # 0171 1234567
_FIVE_PAIRS = re.compile(r"0[1-9]([ .-])\d\d(?:\1\d\d){3}")  # 01.84.17.61.18
# what counts only beside a word such as `call`
_GROUPS = re.compile(r"(?:\d[ -]|\(\d{1,5}\)[ -]?)?\d{2,8}(?:[ -]\d{2,8}){0,5}|\d{2,5}(?:\.\d{2,5}){2,5}|\d{7,13}")
_ROUND = re.compile(r"\d{1,3}(?: \d{3})*(?: ?000)")  # 12 000 000
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_DATE = re.compile(rf"\b{_DAY}([./-]){_DAY}\1(?:\d{{4}}|\d{{2}})\b|\b(?:19|20)\d\d([./-]){_DAY}\2{_DAY}\b")
_BEFORE = re.compile(
    r"\b(?:phones?|telephone|tel|ph|telefon|telefono|téléphone|portable|handy|call(?:s|ed|ing)?|ring|text|sms|"
    r"messag(?:es?|ing)|mobile|cell|reach(?:ed)?|dial(?:led)?|fax|whatsapp|pager|desk|answering|contact)\b",
    re.I,
)
_AFTER = re.compile(
    r"(?:[ -]| ?\(|, ?)(?:office|fax|mobile|cell|home|work|desk|phone|tel)\b\)?(?=\s*(?:$|[\n\\,;.)|/]))", re.I
)
_NO_PHONE = re.compile(
    r"\b(?:order|invoice|bill|ref|reference|ticket|tracking|item|article|serial|isbn|model|part|card|account|policy|"
    r"case|id|zip|sku|vin)(?: (?:number|code|id))?[ :.#=]*(?:no\.?|nr\.?)?[ :.#=]*$",
    re.I,
)
_AMOUNT = re.compile(r" ?(?:[%€$£¥]|(?:usd|eur|gbp|dollars?|euros?|pounds?|times|people|users|units|bytes)\b)", re.I)
_NEAR = 30  # characters before a number in which a word speaks of it


def phones(text: str) -> Iterator[tuple[int, int]]:
    """Where phone numbers are."""
    for match in _NUMBER.finditer(text):
        opens_an_aside = match[0].startswith("(") and match[0].count("(") > match[0].count(")")
        start = match.start() + opens_an_aside
        before = text[max(0, start - _NEAR) : start]
        if _NO_PHONE.search(before):
            continue
        end = match.start("extension") if match["extension"] else match.end()
        span = _by_form(text, start, end) or _by_words(text, start, end, before)
        if span:
            yield span[0], match.end() if span[1] == end else span[1]


def _by_form(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The longest run of its space-separated pieces that has the form of a phone number, if any has."""
    pieces = [(start + piece.start(), start + piece.end()) for piece in re.finditer(r"[^ ]+", text[start:end])]
    for length in range(len(pieces), 0, -1):
        for first in range(len(pieces) - length + 1):
            place = pieces[first][0], pieces[first + length - 1][1]
            if _is_phone(text[place[0] : place[1]], alone=first == 0):
                return place
    return None


def _is_phone(number: str, alone: bool) -> bool:
    """International with `+`, North American, or, where no digits stand before it, five pairs or a leading 0."""
    digits = sum(character.isdigit() for character in number)
    if alone and _FIVE_PAIRS.fullmatch(number):
        return True
    if _DATE.search(number):
        return False
    if number.startswith(("+", "(+")):
        return digits >= 8
    if _NORTH_AMERICAN.fullmatch(number):
        return True
    return alone and 9 <= digits <= 15 and _TRUNK.fullmatch(number) is not None


def _by_words(text: str, start: int, end: int, before: str) -> tuple[int, int] | None:
    """Digits that somebody is to call: a word such as `phone` before them, or `office` after them at a line's end."""
    number = text[start:end]
    digits = sum(character.isdigit() for character in number)
    if not 7 <= digits <= 13 or not _GROUPS.fullmatch(number) or _ROUND.fullmatch(number) or _DATE.search(number):
        return None
    if re.match(r" ?\d", text[end : end + 2]) or _AMOUNT.match(text, end):
        return None
    return (start, end) if _BEFORE.search(before) or _AFTER.match(text, end) else None

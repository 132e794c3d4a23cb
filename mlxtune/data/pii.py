"""Personal data in a text: e-mail, phone, payment card, IBAN, IP address. Knows shapes and check digits, not meaning.

Careful rather than complete: a number counts as a phone or card only where its form or its check digit says so, because
order numbers, dates and prices are far more frequent in training data. Names and postal addresses are not found.
"""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass

ENTITIES = ("email", "phone", "card", "iban", "ip")

# Each begins at a boundary and has bounded repeats, so that no text makes it slow.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24}(?![\w-])(?!:\w)"
)
_NUMBER = re.compile(r"(?<![\w.,/#-])(?:\+ ?|\(\+?)?\d(?:[ ().\-/]{0,2}\d){6,14}(?![\w/])(?![.,-]\d)")
_NORTH_AMERICAN = re.compile(r"(?:\+?1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}")
_TRUNK = re.compile(r"(?:\(0\d{1,5}\) ?|0\d{1,5}[ ./-]{1,2})\d{2,8}(?:[ .-]?\d{2,8}){0,4}")  # 0171 1234567
_LOCAL = re.compile(r"[2-9]\d\d[-.]\d{4}")
_DATE = re.compile(r"\b\d{1,2}([./-])\d{1,2}\1(?:\d{4}|\d{2})\b|\b\d{4}([./-])\d{1,2}\2\d{1,2}\b")
_SPOKEN_OF = re.compile(r"\b(?:phone|telephone|tel|call|ring|text|mobile|cell|reach|dial|fax|whatsapp)\b", re.I)
_NO_PHONE = re.compile(
    r"\b(?:order|invoice|bill|ref|reference|ticket|tracking|item|article|serial|isbn|model|part)"
    r"(?: (?:number|code|id))?[ :.#]*(?:no\.?|nr\.?)?[ :.#]*$",
    re.I,
)
_CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-])(?![.,]\d)")
# Visa · Mastercard · American Express · Discover · JCB · Diners Club
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35\d{14}"
    r"|3(?:0[0-5]|[68]\d)\d{11}"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}", re.I)
# characters of an IBAN: the countries that the IBAN registry gives that length
_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL",
    19: "MK SI",
    20: "AT BA EE KZ LT LU XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS",
    23: "AE GI IL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "PT",
    26: "IS TR",
    27: "FR GR IT MC MR SM",
    28: "AL AZ CY DO GT HU LB PL",
    29: "BR PS QA UA",
    30: "JO KW MU",
    31: "MT",
}
_IBAN_LENGTHS = {country: length for length, countries in _COUNTRIES.items() for country in countries.split()}
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-])(?!\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.I)
_VERSION = re.compile(r"\b(?:version|release|v)[ .]?$", re.I)


@dataclass(frozen=True, slots=True)
class Finding:
    """One piece of personal data: what it is, and `text[start:end]`."""

    entity: str
    start: int
    end: int


def find(text: str) -> list[Finding]:
    """The personal data in a text in order of place; no two overlap."""
    found: list[Finding] = []
    # a stricter form comes first and keeps its place
    for entity, search in (("iban", _ibans), ("card", _cards), ("email", _emails), ("ip", _ips), ("phone", _phones)):
        for start, end in search(text):
            if all(end <= other.start or start >= other.end for other in found):
                found.append(Finding(entity, start, end))
    return sorted(found, key=lambda each: each.start)


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        yield from (match.span() for match in _EMAIL.finditer(text))


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for match in _NUMBER.finditer(text):
        opens_an_aside = match[0].startswith("(") and match[0].count("(") > match[0].count(")")
        start = match.start() + opens_an_aside
        number, before = text[start : match.end()], text[max(0, start - 30) : start]
        if not _NO_PHONE.search(before) and not _DATE.search(number) and _is_phone(number, before):
            yield start, match.end()


def _is_phone(number: str, before: str) -> bool:
    """International with `+`, North American, grouped with a leading 0, or seven digits that somebody is to call."""
    digits = sum(character.isdigit() for character in number)
    if "+" in number:
        return digits >= 8
    if _NORTH_AMERICAN.fullmatch(number):
        return True
    if _TRUNK.fullmatch(number):
        return digits >= 9
    return _LOCAL.fullmatch(number) is not None and _SPOKEN_OF.search(before) is not None


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUERS.fullmatch(digits) and luhn(digits):
            yield match.span()


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right (ISO/IEC 7812-1).

    From the right, every second digit is doubled and its digits are added; the sum is a multiple of 10.
    """
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value // 10 + value % 10 for value in doubled) % 10 == 0


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2].upper(), 0)
        places = [place for place in range(*match.span()) if text[place] != " "][:length]
        if not length or len(places) < length or text[places[-1] + 1 : places[-1] + 2].isalnum():
            continue
        if mod_97("".join(text[place] for place in places)):
            yield match.start(), places[-1] + 1


def mod_97(iban: str) -> bool:
    """Whether the check digits of an IBAN without spaces are right (ISO 13616).

    The first four characters move to the end, letters become 10 to 35, and the number leaves 1 when divided by 97.
    """
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _ips(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text):
        if _is_address(match[0]) and not _VERSION.search(text[max(0, match.start() - 10) : match.start()]):
            yield match.span()
    for match in _IPV6.finditer(text):
        # a group of digits and letters: `a::b` is more often code than an address
        if re.search(r"(?=[a-f]*\d)[0-9a-f]{3,4}", match[0], re.I) and _is_address(match[0]):
            yield match.span()


def _is_address(text: str) -> bool:
    """Whether it is an IP address that can belong to a person's machine."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)

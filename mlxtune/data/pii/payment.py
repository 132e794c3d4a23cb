"""Payment cards and IBANs, by their check digits. Knows no bank: a number with the right check digit may not exist."""

import re
from collections.abc import Iterator

_CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){11,24}(?![\w-])(?![.,]\d)")
# Visa · Mastercard · American Express · Discover · JCB (16 and, older, 15 digits) · Diners Club
_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35\d{14}"
    r"|(?:1800|2131)\d{11}|3(?:0[0-5]|[68]\d)\d{11}"
)
# as cards are printed: in fours, American Express 4-6-5, Diners Club 4-6-4, or in one piece
_PRINTED = re.compile(r"\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19}")
_CARD_WORD = re.compile(
    r"\b(?:cards?|cc|visa|master ?card|maestro|amex|american express|diners|discover|carte|tarjeta|karte)\b", re.I
)
_NEAR = 40  # characters before a number in which a word speaks of it

_IBAN = re.compile(r"(?<!\w)[A-Za-z]{2}[0-9]{2}(?: ?[A-Za-z0-9]){11,30}")
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


def cards(text: str) -> Iterator[tuple[int, int]]:
    """Where card numbers are: an issuer's range, or any range where a word such as `card` is near; Luhn always."""
    for match in _CARD.finditer(text):
        named = _CARD_WORD.search(text, max(0, match.start() - _NEAR), match.start()) is not None
        if _is_card(match[0], named):
            yield match.span()
            continue
        # a date or a code may stand right after it: 4111 1111 1111 1111 12/27
        pieces = [piece.span() for piece in re.finditer(r"[^ ]+", match[0])]
        for first in range(len(pieces)):
            for last in range(len(pieces) - 1, first - 1, -1):
                start, end = pieces[first][0], pieces[last][1]
                if _PRINTED.fullmatch(match[0], start, end) and _is_card(match[0][start:end], named=False):
                    yield match.start() + start, match.start() + end


def _is_card(number: str, named: bool) -> bool:
    digits = re.sub(r"\D", "", number)
    if not 12 <= len(digits) <= 19 or len(set(digits)) == 1 or not luhn(digits):
        return False
    return named or _ISSUERS.fullmatch(digits) is not None


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right (ISO/IEC 7812-1).

    From the right, every second digit is doubled and its digits are added; the sum is a multiple of 10.
    """
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value // 10 + value % 10 for value in doubled) % 10 == 0


def ibans(text: str) -> Iterator[tuple[int, int]]:
    """Where IBANs are: a country of the registry, its length, and check digits that are right."""
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

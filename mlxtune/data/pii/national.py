"""National ids with a check digit or an unmistakable form. Knows the arithmetic of each, not who holds it.

To add one: its form, and a function `compact id -> bool`, in `_FORMS`; with words if the form alone says too little.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_NEAR = 40  # characters before an id in which a word speaks of it
_INSIDE = re.compile(r"[\w.,/-]")  # before an id: it is a part of something longer


def us_ssn(digits: str) -> bool:
    """A US Social Security number: no check digit, but ranges never given out (SSA, randomization of 2011)."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def uk_nino(number: str) -> bool:
    """A UK National Insurance number: no check digit, but prefixes never given out (HMRC, NIM39110)."""
    return number[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def es_dni(number: str) -> bool:
    """A Spanish DNI or NIE: the letter is the number's remainder by 23; X, Y, Z stand for 0, 1, 2 (RD 1553/2005)."""
    digits = number[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == number[-1]


def fr_nir(number: str) -> bool:
    """A French NIR: the last two digits are 97 less the rest's remainder by 97; Corsica 2A is 19, 2B is 18 (INSEE)."""
    digits = number.replace("2A", "19").replace("2B", "18")
    return 97 - int(digits[:13]) % 97 == int(digits[13:])


def de_steuer_id(digits: str) -> bool:
    """A German tax id: one digit of the first ten comes twice or thrice; ISO 7064 MOD 11,10 (BZSt)."""
    repeated = [count for count in Counter(digits[:10]).values() if count > 1]
    if digits[0] == "0" or len(repeated) != 1 or repeated[0] > 3:
        return False
    product = 10
    for digit in digits[:10]:
        product = 2 * ((int(digit) + product) % 10 or 10) % 11
    return (11 - product) % 10 == int(digits[10])


# what a character at an odd place counts: the digits and A to J, then K to Z
_ODD = dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21), strict=True))
_ODD |= dict(zip("ABCDEFGHIJ", _ODD.values(), strict=True))
_ODD |= dict(zip("KLMNOPQRSTUVWXYZ", (2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23), strict=True))


def it_codice_fiscale(code: str) -> bool:
    """An Italian tax code: odd places by a table, even places by value, the sum's remainder by 26 (DM 23/12/1976)."""
    odd = sum(_ODD[character] for character in code[:15:2])
    even = sum(int(character) if character.isdigit() else ord(character) - ord("A") for character in code[1:15:2])
    return chr(ord("A") + (odd + even) % 26) == code[15]


def br_cpf(digits: str) -> bool:
    """A Brazilian CPF: two check digits, each of the digits before it, weighted from 2 up, modulo 11 (Receita)."""
    if len(set(digits)) == 1:
        return False
    for length in (9, 10):
        total = sum(int(digit) * weight for digit, weight in zip(digits, range(length + 1, 1, -1), strict=False))
        if total * 10 % 11 % 10 != int(digits[length]):
            return False
    return True


def in_aadhaar(digits: str) -> bool:
    """An Indian Aadhaar: Verhoeff's scheme (J. Verhoeff, 1969), a product in the dihedral group of ten elements."""
    check, order = 0, list(range(10))
    for digit in reversed(digits):
        check = _dihedral(check, order[int(digit)])
        order = [order[each] for each in (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)]
    return check == 0


def _dihedral(a: int, b: int) -> int:
    """The product of two symmetries of a pentagon: 0 to 4 are rotations, 5 to 9 reflections."""
    rotation = (a % 5 + (b % 5 if a < 5 else -(b % 5))) % 5
    return rotation + 5 * ((a < 5) != (b < 5))


@dataclass(frozen=True, slots=True)
class _Form:
    pattern: re.Pattern[str]
    holds: Callable[[str], bool]
    words: tuple[str, ...]  # one of these must stand before it, if there are any
    near: re.Pattern[str]


def _form(pattern: str, holds: Callable[[str], bool], *words: str) -> _Form:
    pattern = pattern.replace(r"\d", "[0-9]")  # the checks know no other digits
    near = re.compile(rf"\b(?:{'|'.join(words)})\b", re.I)
    return _Form(re.compile(rf"(?:{pattern})(?![\w/])(?![.,-]\w)"), holds, words, near)


_FORMS = (
    _form(r"\d{3}-\d\d-\d{4}", us_ssn),
    _form(r"\d{3}([ .]?)\d\d\1\d{4}", us_ssn, "ssn", "social security"),
    _form(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]", uk_nino),
    _form(r"(?:\d{8}|[XYZ]-?\d{7})-?[A-Z]", es_dni),
    _form(r"[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", fr_nir),
    _form(r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}", de_steuer_id),
    _form(r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", it_codice_fiscale),
    _form(r"\d{3}\.\d{3}\.\d{3}-\d\d", br_cpf),
    _form(r"\d{9}-?\d\d", br_cpf, "cpf"),
    _form(r"[2-9]\d{3}([ -]?)\d{4}\1\d{4}", in_aadhaar, "aadhaar", "aadhar", "uidai", "uid"),
)


def national_ids(text: str) -> Iterator[tuple[int, int]]:
    """Where national ids are."""
    lowered = text.lower()
    for form in _FORMS:
        if form.words and not any(word in lowered for word in form.words):
            continue
        for match in form.pattern.finditer(text):
            # looked at here: a pattern that begins with it is searched five times as slowly
            if match.start() and _INSIDE.match(text, match.start() - 1):
                continue
            named = not form.words or form.near.search(text, max(0, match.start() - _NEAR), match.start())
            if named and form.holds(re.sub(r"[ .-]", "", match[0])):
                yield match.span()

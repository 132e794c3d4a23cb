import time

import pytest

from mlxtune.data.pii import Finding, find, luhn, mod_97


def found(text: str) -> list[tuple[str, str]]:
    return [(each.entity, text[each.start : each.end]) for each in find(text)]


@pytest.mark.parametrize(
    ("entity", "value"),
    [
        ("email", "customer17@example.com"),
        ("email", "first.last+shop@mail.example.co.uk"),
        ("phone", "202-555-0142"),
        ("phone", "(202) 555-0142"),
        ("phone", "+1 202 555 0142"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "+49 (0)30 1234567"),
        ("phone", "020 7946 0958"),
        ("card", "4111 1111 1111 1111"),
        ("card", "5500-0000-0000-0004"),
        ("card", "378282246310005"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB82WEST12345698765432"),
        ("iban", "gb82 west 1234 5698 7654 32"),
        ("ip", "93.184.216.34"),
        ("ip", "2001:db8::8a2e:370:7334"),
    ],
)
@pytest.mark.parametrize("frame", ["{}", "It is {}.", "({}), thanks", "one\n{}\ntwo", "is it {}?"])
def test_finds_it_whole(entity: str, value: str, frame: str) -> None:
    assert found(frame.format(value)) == [(entity, value)]


def test_seven_digits_are_a_phone_where_somebody_is_to_call() -> None:
    assert found("Call me at 555-0142.") == [("phone", "555-0142")]
    assert found("My phone is 555-0142") == [("phone", "555-0142")]
    assert found("pages 255-0142") == []


@pytest.mark.parametrize(
    "text",
    [
        "order 48213, order #48213, HB-48213",
        "order 202-555-0142 and tracking number 202-555-0143",
        "from 2024-05-12 to 12.05.2024, or 01/02/2024 at 10:30",
        "01.02.2024 12:30",
        "it costs $1,299.00 or 1.299,00 or 12 000 000",
        "4111 1111 1111 1112 fails its check digit",
        "1234567812345670 passes it, but no issuer begins with 1",
        "DE89 3704 0044 0532 0130 01 fails its check digits",
        "XX82 WEST 1234 5698 7654 32 is no country",
        "version 1.2.3.4, 1.2.3.4.5, 300.1.1.1, 127.0.0.1, 0.0.0.0",
        "12:30:45 and 00:1A:2B:3C:4D:5E and std::vector and a::b",
        "ISBN 978-3-16-148410-0",
        "@handle, a@b.c, user@host, git@github.com:owner/project.git",
        "pages 200-2000, the years 1999-2004, 2023 2024 2025",
        "x = 0.12 0.34 0.56, pi = 3.14159265358979",
        "1234567890 and 00340434161094012345",
        "0 1 2 3 4 5 6 7 8 9",
    ],
)
def test_traps_are_not_personal_data(text: str) -> None:
    assert found(text) == []


def test_several_in_order_and_without_overlap() -> None:
    text = "Write to a@example.com, pay 4111 1111 1111 1111, call +1 202 555 0142."
    assert find(text) == [Finding("email", 9, 22), Finding("card", 28, 47), Finding("phone", 54, 69)]


def test_luhn_by_hand() -> None:
    # 79927398713 from the right, every second digit doubled and its digits added: 3 2 7 7 9 6 7 4 9 9 7, 70 in all
    assert [digit for digit in "0123456789" if luhn(f"7992739871{digit}")] == ["3"]


def test_mod_97_by_hand() -> None:
    # GB82 WEST…: WEST12345698765432 GB82 -> 3214282912345698765432161182, which leaves 1
    assert 3214282912345698765432161182 % 97 == 1
    assert mod_97("GB82WEST12345698765432")
    assert not mod_97("GB82WEST12345698765423")


@pytest.mark.parametrize("piece", ["a", "a.b@", "1 ", "1-", "DE12", "1:", "1.1.", "(", "+1", "a@a."])
def test_no_text_makes_it_slow(piece: str) -> None:
    started = time.process_time()
    find(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 2

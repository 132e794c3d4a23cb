import json
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtune.data.pii import ENTITIES, NAMES, Finding, find, national, without_overlap
from mlxtune.data.pii.payment import luhn, mod_97
from mlxtune.errors import InputError

SHARED = Path(os.environ.get("MLXTUNE_SHARED", Path(__file__).parents[3] / "shared")) / "assets" / "data"


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
        ("card", "3782 822463 10005"),
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB82WEST12345698765432"),
        ("iban", "gb82 west 1234 5698 7654 32"),
        ("ip", "93.184.216.34"),
        ("ip", "2001:db8::8a2e:370:7334"),
        ("phone", "01.84.17.61.18"),
        ("phone", "001-518-640-0854"),
        ("phone", "+1-903-140-4508x769"),
        ("phone", "202-555-0142 ext. 12"),
        ("national_id", "460-89-9847"),
        ("national_id", "AB 12 34 56 C"),
        ("national_id", "12345678Z"),
        ("national_id", "X1234567L"),
        ("national_id", "2 55 08 14 168 025 38"),
        ("national_id", "86 095 742 719"),
        ("national_id", "RSSMRA85T10A562S"),
        ("national_id", "111.444.777-35"),
        ("key", "sk-proj-4f9Kd02mQpL7xZ31TtYw"),
        ("key", "ghp_" + "a1B2c3" * 6),
        ("key", "AKIAIOSFODNN7EXAMPLE"),
        ("key", "xoxb-1234567890-abcDEF"),
        ("key", "hf_" + "aB" * 17),
        ("key", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJlLTEyMw"),
        ("key", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/IBAAKC\nAQEA==\n-----END RSA PRIVATE KEY-----"),
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
    ("text", "value"),
    [
        ("They are not answering at 699 956 915", "699 956 915"),
        ("Phone:\n467 3395\n", "467 3395"),
        ("Fax: 9498777106", "9498777106"),
        ("416 60 039 office\nParis", "416 60 039"),
        ("(37) 788-063-Office\\,07700 063 966-Fax", "(37) 788-063"),
        ("text me at 345-899-3560x4587", "345-899-3560x4587"),
        ("ph 987 123 3654", "987 123 3654"),
    ],
)
def test_words_beside_a_number_make_it_a_phone(text: str, value: str) -> None:
    assert ("phone", value) in found(text)
    assert found(value) == [] or len(re.sub(r"\D", "", value)) > 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("My card 630427373398 is lost", "630427373398"),
        ("charge 4111 1111 1111 1111 12/27 please", "4111 1111 1111 1111"),
        ("charge 4111111111111111 123", "4111111111111111"),
        ("the 2 4111-1111-1111-1111", "4111-1111-1111-1111"),
    ],
)
def test_a_card_beside_other_things(text: str, value: str) -> None:
    assert found(text) == [("card", value)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("my password is hunter2.", "hunter2"),
        ("password: 'Tr0ub4dor&3'", "Tr0ub4dor&3"),
        ('{"passwd": "s3cret!"}', "s3cret!"),
        ("PWD=abc123", "abc123"),
        ("API_KEY = 'f00dfacef00dface'", "f00dfacef00dface"),
        ("client-secret: 0a1b2c3d4e5f6071", "0a1b2c3d4e5f6071"),
        ("Authorization: Bearer abcdef0123456789abcdef", "abcdef0123456789abcdef"),
        ("postgres://anna:pa55@db.example.com/x", "anna:pa55"),
        ("https://anna:pa55@example.com", "anna:pa55"),
    ],
)
def test_a_secret_that_the_text_assigns(text: str, value: str) -> None:
    assert found(text) == [("key", value)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("SSN 460 89 9847", "460 89 9847"),
        ("CPF 11144477735", "11144477735"),
        ("Aadhaar: 2341 2341 2346", "2341 2341 2346"),
    ],
)
def test_a_national_id_that_words_name(text: str, value: str) -> None:
    assert found(text) == [("national_id", value)]
    assert found(value) == []


@pytest.mark.parametrize(
    "text",
    [
        "000-12-3456, 666-12-3456, 900-12-3456, 123-00-4567, 123-45-0000",
        "BG123456A, DA123456A, AO123456A, AB123456E",
        "12345678A, 1234567L, 2 55 08 14 168 025 39, 86095742718, RSSMRA85T10A562T, 111.444.777-36",
        "Aadhaar: 2341 2341 2345",
        "Enter your password: it must have 8 characters. password = ********, password=os.environ['P1']",
        "password: required, passwords are secrets, the password is wrong, password = get_password(2)",
        "api_key = load_key(), token: string, the secret is patience, a token = tokenizer.encode(x1)",
        "sk-learn, task-force-of-twenty-people-and-more, AKIA, ghp_short, https://example.com:8080/a@b",
        "My phone costs 12 000 000 and the call took 1234567 times",
        "call order number 9498777106, text ref: 5551234",
        "SELECT phone FROM t WHERE id = 12345678 AND year = 2019",
        "it has 1 234 567 mobile users",
        "01-02-2024 10 11 12, 2024-01-02 03:04:05, Phone:\n2024-01-02",
        "Wage: 1234567.89 a year, 0.123456789, #4155551234",
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


def test_verhoeff_by_hand() -> None:
    # the check digit of 236 is 3: Verhoeff's own example
    assert [digit for digit in "0123456789" if national.in_aadhaar(f"236{digit}")] == ["3"]


@pytest.mark.parametrize(
    ("holds", "number"),
    [
        (national.es_dni, "12345678Z"),
        (national.fr_nir, "255081416802538"),
        (national.de_steuer_id, "86095742719"),
        (national.it_codice_fiscale, "RSSMRA85T10A562S"),
        (national.br_cpf, "11144477735"),
        (national.in_aadhaar, "234123412346"),
    ],
)
def test_a_check_digit_sees_every_slip_of_one_digit(holds, number: str) -> None:  # type: ignore[no-untyped-def]
    assert holds(number)
    slips = [
        number[:place] + digit + number[place + 1 :]
        for place, right in enumerate(number)
        for digit in "0123456789"
        if right.isdigit() and digit != right
    ]
    assert [slip for slip in slips if holds(slip)] == []


@pytest.mark.parametrize("value", ["\u017fE45 5000 0000 0583 9825 7466", "RSSMRA\u0668\u0665T10A562S", "\u0661" * 16])
def test_digits_and_letters_of_other_scripts_do_no_harm(value: str) -> None:
    assert found(value) == []


@settings(deadline=None)
@given(st.text(st.sampled_from("0159aAxXeE+-().,:/@#='\"[] \n\\\u017f\u212a\u0661\u00b2\uff11"), max_size=60))
def test_any_text_can_be_searched(text: str) -> None:
    findings = find(text)
    ends = [place for each in findings for place in (each.start, each.end)]
    assert ends == sorted(ends)
    assert all(each.entity in ENTITIES and each.start < each.end for each in findings)


def test_every_entity_has_a_name() -> None:
    assert tuple(NAMES) == ENTITIES


def test_of_two_that_overlap_the_first_stays() -> None:
    first, second, third = Finding("a", 5, 9), Finding("b", 0, 6), Finding("c", 0, 5)
    assert without_overlap([first, second, third]) == [third, first]
    assert without_overlap([Finding("a", 0, 9), Finding("b", 3, 4)]) == [Finding("a", 0, 9)]


KINDS = {"EMAIL_ADDRESS": "email", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "PHONE_NUMBER": "phone"}


@pytest.mark.parametrize("kind", KINDS)
def test_recall_on_labelled_texts(kind: str) -> None:
    path = SHARED / "presidio" / "synth_dataset_v2.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    labelled = hit = 0
    for row in json.loads(path.read_text(encoding="utf-8")):
        spans = [(each["start_position"], each["end_position"]) for each in row["spans"] if each["entity_type"] == kind]
        places = {(each.start, each.end) for each in find(row["full_text"]) if each.entity == KINDS[kind]}
        labelled += len(spans)
        hit += len(places & set(spans))
    assert labelled > 20
    assert hit / labelled >= 0.95


def test_names_need_a_library_or_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxtune.data.pii import presidio

    presidio._analyzer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "presidio_analyzer", None)
    with pytest.raises(InputError, match=r"names need presidio-analyzer.*pip install 'mlxtune\[pii\]'"):
        presidio.find("Anna lives in Rome")


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_presidio_adds_to_the_core() -> None:
    pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed")
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    from mlxtune.data.pii import presidio

    if not any(spacy.util.is_package(name) for name in presidio.MODELS):
        with pytest.raises(InputError, match="python -m spacy download en_core_web_sm"):
            presidio.find("Anna lives in Rome")
        pytest.skip("no English spaCy model is installed: names cannot be tried")
    text = "Write to Anna Miller in Rome at anna@example.com."
    values = {(each.entity, text[each.start : each.end]) for each in presidio.find(text)}
    assert values >= {("person", "Anna Miller"), ("place", "Rome"), ("email", "anna@example.com")}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_presidio_over_a_blank_pipeline_finds_patterns() -> None:
    pytest.importorskip("presidio_analyzer", reason="presidio-analyzer is not installed")
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    from mlxtune.data.pii import presidio

    engine = presidio.engine(spacy.blank("en"))
    text = "Pay to 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"
    found = engine.analyze(text, language="en", entities=list(presidio.ENTITIES), score_threshold=0.5)
    assert [(presidio.ENTITIES[each.entity_type], text[each.start : each.end]) for each in found] == [
        ("wallet", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa")
    ]


@pytest.mark.parametrize(
    "piece",
    [
        *("a", "a.b@", "1 ", "1-", "DE12", "1:", "1.1.", "(", "+1", "a@a.", "1.1.1.1 ", "call 1", "4111 ", "0 1", "A1"),
        *(
            "password: ",
            "pwd=a1",
            "sk-",
            "eyJaaaaaaaa.",
            "://a:",
            "-----BEGIN PRIVATE KEY-----",
            "api_key",
            "x1 ",
            " =",
        ),
        *("Bearer ", "key: \t", "12 345 ", "1234567x1 ", "ABCDEF12", "a:a@", '"', "'", "é", "1 x 1"),
    ],
)
def test_no_text_makes_it_slow(piece: str) -> None:
    started = time.process_time()
    find(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 2

import json
from pathlib import Path
from typing import Any

import pytest

from mlxtune.data.audit import Finding, audit
from mlxtune.data.audit.language import language_of
from mlxtune.data.audit.style import unbalanced
from mlxtune.recipe import DataRecipe

USUAL = "Thank you for your message about {}, we will look at what you sent to us and write to you when it is done."


def style(path: Path, answers: list[str]) -> list[Finding]:
    rows = [{"prompt": f"question {n} {'xyz'[n % 3] * (n + 3)}", "completion": a} for n, a in enumerate(answers)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    found = audit({"all": path}, DataRecipe(), None, fast=True).findings
    return [each for each in found if each.kind == "style"]


def usual(count: int = 30) -> list[str]:
    return [USUAL.format(f"the {'abc'[n % 3] * (n + 2)}") for n in range(count)]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Please send it to the address that you have in your account.", "English"),
        ("Bitte senden Sie es an die Adresse, die wir von Ihnen haben.", "German"),
        ("Nous vous avons envoyé le colis, il est dans la boîte aux lettres.", "French"),
        ("El paquete que pidió está en la oficina y no se puede enviar.", "Spanish"),
        ("Il pacco che ha ordinato non è ancora arrivato nella sede di Roma.", "Italian"),
        ("O pacote que você pediu não está mais em nossa loja, mas já foi enviado.", "Portuguese"),
        ("Het pakket dat u heeft besteld is nog niet bij ons en wordt later gestuurd.", "Dutch"),
        ("Paketet som du har beställt är inte här och vi vet inte när det kommer till dig.", "Swedish"),
        ("Ваш заказ отправлен.", "Cyrillic"),
        ("您的订单已发货。", "Chinese"),
        ("ご注文は発送されました。", "Japanese"),
        ("주문이 발송되었습니다.", "Korean"),
        ("تم إرسال طلبك.", "Arabic"),
        ("refund", None),
        ("4 * (3 + 2) = 20", None),
        ("", None),
        ("The word for it is Привет in Russian, and you should say it to the people you meet.", "English"),
    ],
)
def test_languages(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_an_answer_in_another_language(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (found,) = style(
        path, [*usual(), "Bitte senden Sie es an die Adresse, die wir von Ihnen haben.", "Ваш заказ отправлен."]
    )
    assert (found.severity, found.count, found.detail) == ("info", 2, "in another language than most answers")
    assert found.notes == ("probably German", "probably Cyrillic")
    assert found.where == (f"{path}:31", f"{path}:32")


def test_a_set_of_two_languages_has_no_usual_one(tmp_path: Path) -> None:
    german = [f"Bitte senden Sie es an die Adresse {n * 'x'}, die wir von Ihnen haben." for n in range(30)]
    assert style(tmp_path / "a.jsonl", usual() + german) == []


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (
            "As an AI language model, I have no opinion on what you wrote to us.",
            "an assistant's boilerplate in the answer",
        ),
        (
            "I don't have access to real-time data, so that is all that I can say.",
            "an assistant's boilerplate in the answer",
        ),
        ("I'm sorry, but I can't help you with that, as it is not allowed to us.", "the answer refuses"),
        ("I’m sorry, but I can’t do what you have asked for in your message to us.", "the answer refuses"),
        ("I cannot assist with this request, and will not be able to do so later.", "the answer refuses"),
        ("Unfortunately, I am unable to answer what you have asked us in this.", "the answer refuses"),
    ],
)
def test_refusals_and_boilerplate(tmp_path: Path, answer: str, detail: str) -> None:
    (found,) = style(tmp_path / "a.jsonl", [*usual(), answer])
    assert (found.severity, found.count, found.detail) == ("warning", 1, detail)


@pytest.mark.parametrize(
    "answer",
    [
        "We are sorry that the parcel was late, and have sent the money back to you.",
        "You can say that you are sorry, but I can see that you do not want to do so.",
        "An assistant will write to you about it, and you can say what you want to have.",
    ],
)
def test_what_is_no_refusal(tmp_path: Path, answer: str) -> None:
    assert style(tmp_path / "a.jsonl", [*usual(), answer]) == []


def test_one_word_among_sentences(tmp_path: Path) -> None:
    (found,) = style(tmp_path / "a.jsonl", [*usual(), "Yes."])
    assert (found.detail, found.notes) == ("one word, where most answers are sentences", ("'Yes.'",))
    assert style(tmp_path / "b.jsonl", [*usual(), *[f"Word{n}" for n in range(10)]]) == []  # a quarter: that is usual


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("all (of it) is [well] {here}", None),
        ("cut off (in the", "`(` is not closed"),
        ("too many) of them", "a `)` too many"),
        ("crossed ([)]", "a `)` too many"),
        ('he said "no', 'an odd number of `"`'),
        ("he said “no", "`“` and `”` do not match"),
        ("German „so“ and English “so”", None),
        ("1) first\n2) second\n(a) third, b) fourth", None),
        ("glad to help :) and sorry :(", None),
        ('a 12" record and a 7" one and a 10" one', None),
        ("f(20) and f(x)", None),
        ("it's", None),
    ],
)
def test_brackets_and_quotes(text: str, found: str | None) -> None:
    assert unbalanced(text) == found


def test_an_answer_that_is_cut_off(tmp_path: Path) -> None:
    (found,) = style(tmp_path / "a.jsonl", [*usual(), USUAL.format("this (and that")])
    assert (found.severity, found.count, found.notes) == ("info", 1, ("`(` is not closed",))


def test_broken_json_among_json(tmp_path: Path) -> None:
    good = [json.dumps({"intent": f"a{n}", "note": "I'm sorry, but I can't (yet"}) for n in range(20)]
    broken = ['{"intent": "a"', "not at all", '"a text"', '```json\n{"intent": "b"}\n```']
    found = [each for each in style(tmp_path / "a.jsonl", good + broken) if "JSON" in each.detail]
    assert [(each.severity, each.count) for each in found] == [("warning", 3)]
    assert found[0].notes == (
        "Expecting ',' delimiter at character 15",
        "Expecting value at character 1",
        "neither an object nor a list",
    )


def test_labels_have_no_style(tmp_path: Path) -> None:
    assert style(tmp_path / "a.jsonl", ["late", "refund (partly"] * 15) == []


def test_a_few_answers_make_no_style(tmp_path: Path) -> None:
    assert style(tmp_path / "a.jsonl", ["one (", "As an AI, no."]) == []


def test_real_arithmetic_has_few_findings(shared_assets: Path) -> None:
    data = DataRecipe(prompt="{{ question }}", completion="{{ answer }}")
    found: list[Any] = list(
        audit({"train": shared_assets / "data" / "gsm8k" / "train.jsonl"}, data, None, fast=True).findings
    )
    assert sum(each.count for each in found if each.kind in ("style", "stale_fact")) <= 20

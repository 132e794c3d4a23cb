"""The same row asked in other ways: every message of the result by hand, and what never changes."""

import pytest

from mlxtune.comparison import candidates
from mlxtune.data.formats import Chat, Completion, Example, Text, answer_text
from mlxtune.errors import RecipeError

ROW = Completion("Where is it?", "card_arrival")
CHAT = Chat(
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": "On its way"},
    ],
    [{"type": "function", "function": {"name": "look"}}],
)


def said(example: Example) -> list[tuple[str, str]]:
    assert isinstance(example, Chat)
    return [(message["role"], message["content"]) for message in example.messages]


def test_a_prompt_before_a_prompt() -> None:
    assert candidates.with_prompt(ROW, "Name the intent.", "f:1") == Completion(
        "Name the intent.\n\nWhere is it?", "card_arrival"
    )


def test_a_system_message_stands_behind_the_rows_own() -> None:
    made = candidates.with_prompt(CHAT, "Be short.", "f:1")
    assert said(made) == [("system", "Be kind.\n\nBe short."), *said(CHAT)[1:]]
    assert isinstance(made, Chat)
    assert made.tools == CHAT.tools
    plain = Chat(CHAT.messages[1:])
    assert said(candidates.with_prompt(plain, "Be short.", "f:1")) == [("system", "Be short."), *said(plain)]


def test_without_a_system_role_it_stands_before_the_question() -> None:
    made = said(candidates.with_prompt(CHAT, "Be short.", "f:1", system=False))
    assert made == [*said(CHAT)[:3], ("user", "Be short.\n\nWhere is it?"), said(CHAT)[4]]


def test_a_template_takes_the_place_of_the_last_question() -> None:
    prompt = "Q: {{ prompt | upper }}\nA:"
    assert candidates.with_prompt(ROW, prompt, "f:1") == Completion("Q: WHERE IS IT?\nA:", "card_arrival")
    assert said(candidates.with_prompt(CHAT, prompt, "f:1")) == [
        *said(CHAT)[:3],
        ("user", "Q: WHERE IS IT?\nA:"),
        ("assistant", "On its way"),
    ]


def test_what_a_row_says_is_no_template() -> None:
    row = Completion("{{ 7 * 7 }}{% raw %}", "x")
    made = candidates.with_prompt(row, "Q: {{ prompt }}", "f:1")
    assert made == Completion("Q: {{ 7 * 7 }}{% raw %}", "x")


def test_examples_are_context_and_the_best_stands_last() -> None:
    shown: list[Example] = [Completion("best?", "b"), CHAT]
    made = candidates.with_examples(ROW, shown)
    assert said(made) == [
        *said(CHAT)[1:],  # without its system message
        ("user", "best?"),
        ("assistant", "b"),
        ("user", "Where is it?"),
        ("assistant", "card_arrival"),
    ]
    assert isinstance(made, Chat)
    weights = [message.get("weight") for message in made.messages if message["role"] == "assistant"]
    assert weights == [0, 0, 0, None]
    assert all("weight" not in message for message in CHAT.messages)


def test_examples_stand_behind_the_rows_system_message() -> None:
    made = said(candidates.with_examples(CHAT, [ROW]))
    assert made == [
        said(CHAT)[0],
        ("user", "Where is it?"),
        ("assistant", "card_arrival"),
        *said(CHAT)[1:],
    ]


def test_passages_stand_before_the_last_question() -> None:
    made = candidates.with_passages(ROW, ["best", "second"])
    assert made == Completion(f"{candidates.PASSAGES}\n\nsecond\n\nbest\n\nWhere is it?", "card_arrival")
    assert said(candidates.with_passages(CHAT, ["p"]))[3] == ("user", f"{candidates.PASSAGES}\n\np\n\nWhere is it?")


def test_nothing_to_show_changes_nothing() -> None:
    assert candidates.with_examples(ROW, []) is ROW
    assert candidates.with_passages(CHAT, []) is CHAT


def test_plain_text_stays_as_it_is() -> None:
    text = Text("a story")
    assert candidates.with_prompt(text, "p", "f:1") is text
    assert candidates.with_examples(text, [ROW]) is text
    assert candidates.with_passages(text, ["p"]) is text


@pytest.mark.parametrize("example", [ROW, CHAT])
def test_the_expected_answer_never_changes(example: Example) -> None:
    for made in (
        candidates.with_prompt(example, "p", "f:1"),
        candidates.with_prompt(example, "{{ prompt }}?", "f:1"),
        candidates.with_examples(example, [CHAT, ROW]),
        candidates.with_passages(example, ["p"]),
    ):
        assert answer_text(made) == answer_text(example)


def test_what_asks_for_the_answer() -> None:
    assert candidates.messages_asked(CHAT) == CHAT.messages[:4]
    assert candidates.messages_asked(ROW) == [{"role": "user", "content": "Where is it?"}]
    with pytest.raises(ValueError, match="asks nothing"):
        candidates.messages_asked(Text("t"))


def test_fixed_examples_take_each_label_equally_often() -> None:
    answers = [f"{label}: text {number}" for label, count in (("a", 50), ("b", 5), ("c", 1)) for number in range(count)]
    chosen = candidates.fixed_examples(answers, 6, r"(\w+):", seed=0)
    assert len(set(chosen)) == 6
    first = {answers[place][0] for place in chosen[:3]}
    assert first == {"a", "b", "c"}
    counts = [sum(answers[place][0] == label for place in chosen) for label in "abc"]
    assert counts in ([2, 3, 1], [3, 2, 1])  # c has one row only
    assert chosen == candidates.fixed_examples(answers, 6, r"(\w+):", seed=0)
    assert chosen != candidates.fixed_examples(answers, 6, r"(\w+):", seed=1)


def test_fixed_examples_without_a_pattern() -> None:
    repeated: list[str | None] = ["yes"] * 9 + ["no"] * 3 + [None]
    assert {repeated[place] for place in candidates.fixed_examples(repeated, 2, None, seed=3)} == {"yes", "no"}
    free = [f"answer {number}" for number in range(10)]
    assert len(set(candidates.fixed_examples(free, 4, None, seed=3))) == 4
    assert candidates.fixed_examples([None, None], 4, None, seed=3) == []


def test_labels_and_the_prompt_that_names_them() -> None:
    assert candidates.labels_of(["b", " a\n", None, "b"], r"(\w+)") == (["a", "b"], True)
    assert candidates.labels_of(["b\nthanks", "a"], r"\A(\w+)") == (["a", "b"], False)
    assert candidates.labels_of(["yes", "no"] * 30, None) == (["no", "yes"], True)
    assert candidates.labels_of([f"answer {number}" for number in range(60)], None) == ([], True)
    assert candidates.label_prompt(["a", "b"], alone=True) == "Answer with exactly one of these labels: a, b."
    assert candidates.label_prompt(["a", "b"], alone=False) == "Begin the answer with one of these labels: a, b."
    assert candidates.label_prompt(["a"], alone=True) is None
    assert candidates.label_prompt([str(number) for number in range(101)], alone=True) is None


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("  ", "compare.prompt: is empty"),
        ("{{ prompt", "compare.prompt: '{{ prompt' is no valid template: "),
        ("{{ question }} {{ prompt }}", "compare.prompt: '{{ question }} {{ prompt }}' does not fit: "),
        ("{% if 1 %}x{% endif %}", "compare.prompt: has no {{ prompt }}"),
        ("{{ ''.__class__.__mro__ }} {{ prompt }}", "compare.prompt: "),
    ],
)
def test_a_prompt_that_cannot_be_filled_in(prompt: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        candidates.check_prompt(prompt)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("prompt", ["Be short. Use {braces}.", "{{ prompt }}"])
def test_a_good_prompt(prompt: str) -> None:
    candidates.check_prompt(prompt)

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtune.data import pii
from mlxtune.data.formats import Chat, Completion, Example, Text
from mlxtune.data.redact import redact, restore

CARD = "4111 1111 1111 1111"


def test_a_chat_is_redacted_as_one_conversation() -> None:
    chat = Chat(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "I am anna@example.com, call +1 202 555 0142."},
            {"role": "assistant", "content": "Is Anna@Example.com right? Or bob@example.com?", "weight": 0},
            {"role": "user", "content": "Yes. Not +1-202-555-0142 but (202) 555-0199."},
            {"role": "assistant", "content": "Noted.", "reasoning_content": "Call (202) 555-0199 then."},
        ]
    )
    redacted, originals = redact(chat)
    assert redacted == Chat(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "I am [EMAIL_1], call [PHONE_1]."},
            {"role": "assistant", "content": "Is [EMAIL_1] right? Or [EMAIL_2]?", "weight": 0},
            {"role": "user", "content": "Yes. Not [PHONE_1] but [PHONE_2]."},
            {"role": "assistant", "content": "Noted.", "reasoning_content": "Call [PHONE_2] then."},
        ]
    )
    assert originals == {
        "[EMAIL_1]": "anna@example.com",
        "[PHONE_1]": "+1 202 555 0142",
        "[EMAIL_2]": "bob@example.com",
        "[PHONE_2]": "(202) 555-0199",
    }


def test_a_value_spelt_in_two_ways_comes_back_as_first_spelt() -> None:
    redacted, originals = redact(Text("4111 1111 1111 1111 or 4111111111111111"))
    assert redacted == Text("[CARD_1] or [CARD_1]")
    assert restore(redacted, originals) == Text("4111 1111 1111 1111 or 4111 1111 1111 1111")


def test_addresses_and_passwords_that_differ_stay_apart() -> None:
    text = "93.184.21.6 and 93.18.42.16, a.b@example.com and ab@example.com, password: Abc123 then password: abc123"
    redacted, originals = redact(Text(text))
    assert redacted == Text("[IP_1] and [IP_2], [EMAIL_1] and [EMAIL_2], password: [KEY_1] then password: [KEY_2]")
    assert restore(redacted, originals) == Text(text)


def call(arguments: object) -> dict[str, object]:
    return {"id": "call_1", "type": "function", "function": {"name": "send", "arguments": arguments}}


def test_tool_calls_and_results() -> None:
    written = '{ "to": "anna@example.com",\n"note": "\\u00fc\\ncall 202-555-0142", "n": 3, "card": 4111111111111111}'
    chat = Chat(
        [
            {"role": "user", "content": "Send it to anna@example.com"},
            {"role": "assistant", "content": None, "tool_calls": [call(written)]},
            {"role": "tool", "content": '{"phone": "5551234567", "ok": true}', "tool_call_id": "call_1"},
            {
                "role": "assistant",
                "tool_calls": [call({"to": ["anna@example.com"], "pin": 12, "card": 4111111111111111})],
            },
        ],
        tools=[{"type": "function", "function": {"name": "send"}}],
    )
    redacted, originals = redact(chat)
    assert isinstance(redacted, Chat)
    first = redacted.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert first == ('{ "to": "[EMAIL_1]",\n"note": "\\u00fc\\ncall [PHONE_1]", "n": 3, "card": "[CARD_1]"}')
    assert redacted.messages[2]["content"] == '{"phone": "[PHONE_2]", "ok": true}'
    assert redacted.messages[3]["tool_calls"] == [call({"to": ["[EMAIL_1]"], "pin": 12, "card": "[CARD_1]"})]
    assert redacted.tools == chat.tools
    back = restore(redacted, originals)
    assert isinstance(back, Chat)
    # the limit: an integer comes back as a text
    assert back.messages[1]["tool_calls"][0]["function"]["arguments"] == written.replace(
        "4111111111111111", '"4111111111111111"'
    )
    assert back.messages[2] == chat.messages[2]


def test_the_example_itself_is_not_changed() -> None:
    messages = [{"role": "user", "content": "a@example.com"}, {"role": "assistant", "content": "b@example.com"}]
    before = json.dumps(messages)
    redact(Chat(messages))
    assert json.dumps(messages) == before


def test_placeholders_that_are_there_already_are_left_alone() -> None:
    example = Completion("Say [EMAIL_1] and [EMAIL_3], a@example.com", "b@example.com [EMAIL_9]")
    redacted, originals = redact(example)
    assert redacted == Completion("Say [EMAIL_1] and [EMAIL_3], [EMAIL_2]", "[EMAIL_4] [EMAIL_9]")
    assert restore(redacted, originals) == example


def test_what_stands_beside_a_finding_is_found_in_turn() -> None:
    def nines(text: str) -> list[pii.Finding]:
        place = text.find("9")
        return [] if place < 0 else [pii.Finding("nine", place, place + 1)]

    assert redact(Text("1929"), nines) == (Text("1[NINE_1]2[NINE_1]"), {"[NINE_1]": "9"})


def test_a_search_that_finds_placeholders_comes_to_an_end() -> None:
    def words(text: str) -> list[pii.Finding]:
        return [pii.Finding("word", 0, len(text))] if text else []

    assert redact(Text("abc"), words) == (Text("[WORD_1]"), {"[WORD_1]": "abc"})


@pytest.mark.parametrize("text", ["{not json", "[1, 2", '{"a": 1} a@example.com', "[" * 100_000])
def test_what_only_looks_like_json_is_text(text: str) -> None:
    chat = Chat([{"role": "tool", "content": text}])
    redacted, originals = redact(chat)
    assert restore(redacted, originals) == chat


VALUES = st.sampled_from(
    [
        *("anna@example.com", "bob@example.com", "+1 202 555 0142", "(202) 555-0199", CARD, "5500-0000-0000-0004"),
        *("DE89 3704 0044 0532 0130 00", "93.184.216.34", "460-89-9847", "12345678Z", "password: hunter2"),
        *(
            "AKIAIOSFODNN7EXAMPLE",
            "https://anna:pa55@example.com",
            "call 555-0142",
            "[EMAIL_1]",
            "[PHONE_2]",
            "[CARD_1",
        ),
    ]
)
PIECES = VALUES | st.text(max_size=12) | st.sampled_from([" ", ", ", "\n", "-", ".", "@", "1", "[", "]", '"', "\\"])
TEXTS = st.lists(PIECES, max_size=8).map("".join)
CHATS = st.builds(
    lambda texts, arguments: Chat(
        [
            {"role": "user", "content": texts[0]},
            {"role": "assistant", "content": texts[1], "reasoning_content": texts[2], "tool_calls": [call(arguments)]},
            {"role": "tool", "content": texts[3]},
        ]
    ),
    st.lists(TEXTS, min_size=4, max_size=4),
    st.dictionaries(st.sampled_from(["to", "phone", "card", "text"]), TEXTS, max_size=3)
    | st.dictionaries(st.sampled_from(["to", "phone", "card", "text"]), TEXTS, max_size=3).map(json.dumps),
)
EXAMPLES = CHATS | st.builds(Completion, TEXTS, TEXTS) | st.builds(Text, TEXTS)


def texts_of(example: Example) -> list[str]:
    if isinstance(example, Completion):
        return [example.prompt, example.completion]
    if isinstance(example, Text):
        return [example.text]
    arguments = example.messages[1]["tool_calls"][0]["function"]["arguments"]
    inner = json.loads(arguments) if isinstance(arguments, str) else arguments
    strings = [message[part] for message in example.messages for part in message if part.endswith("content")]
    return [*strings, *inner.values()]


def written_of(example: Example) -> list[str]:
    """The arguments of tool calls as written, where no escape is in the way."""
    if not isinstance(example, Chat):
        return []
    arguments = example.messages[1]["tool_calls"][0]["function"]["arguments"]
    return [arguments] if isinstance(arguments, str) and "\\" not in arguments else []


def spelt_alike(values: set[str]) -> bool:
    """Whether no value is written in a second way."""
    plain = ["".join(filter(str.isalnum, value)).casefold() for value in values]
    return len(plain) == len(set(plain))


@settings(deadline=None, max_examples=300)
@given(EXAMPLES)
def test_nothing_is_left_and_everything_comes_back(example: Example) -> None:
    values: set[str] = set()

    def find(text: str) -> list[pii.Finding]:
        found = pii.find(text)
        values.update(text[each.start : each.end] for each in found)
        return found

    redacted, originals = redact(example, find)
    assert [each for text in texts_of(redacted) + written_of(redacted) for each in pii.find(text)] == []
    assert redact(redacted) == (redacted, {})
    assert set(originals.values()) <= values
    if spelt_alike(values):
        back = restore(redacted, originals)
        # an escaped letter of JSON within a text may come back as the letter
        assert back == example or texts_of(back) == texts_of(example)

"""Rendering: exactly the answers are learned, on the embedded tokenizer and on real ones."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlxtune.data.files import Row
from mlxtune.data.formats import Chat, Completion, Example, Text
from mlxtune.data.render import Limit, Rendered, Sample, render
from mlxtune.errors import DataError, ModelError
from mlxtune.recipe import DataRecipe
from mlxtune.rundir import read_json
from mlxtune.tokenizer import PLAIN_TEMPLATE, inner, load_for_rows

PACKAGE = Path(__file__).parents[2] / "mlxtune"
REAL = ("qwen2.5-0.5b-instruct", "smollm2-135m-instruct", "mistral-v3", "ort-phi-3-mini")
LOADED: dict[Path, Any] = {}

# a generation prompt that opens a thought, and a history without the thoughts, in the manner of DeepSeek-R1
OPENS_A_THOUGHT = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
# the answer to the last question stands behind a thought, which may be empty; earlier ones lose it, as in Qwen3
EMPTY_THOUGHT = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


def load(path: Path) -> Any:
    """A tokenizer, loaded once for all tests: the large ones take seconds."""
    if path not in LOADED:
        LOADED[path] = AutoTokenizer.from_pretrained(path)
    return LOADED[path]


TINY = load(PACKAGE / "assets" / "tiny")


@pytest.fixture(params=("tiny", *REAL))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "tiny":
        return TINY
    return load(request.getfixturevalue("shared_assets") / "tokenizers" / request.param)


@pytest.fixture
def plain(stories: Path) -> Any:
    """A real tokenizer without a chat template, which puts a beginning-of-text token in front."""
    return load(stories)


def with_template(template: str | None) -> Any:
    """The embedded tokenizer with another chat template."""
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(TINY.backend_tokenizer.to_str()), eos_token="<|im_end|>"
    )
    changed.chat_template = template
    return changed


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat([{"role": role, "content": content} for role, content in turns])


def rendered(tokenizer: Any, *examples: Example, max_seq_length: int = 10_000, **data: Any) -> Rendered:
    rows = [(Row("chats.jsonl", line, {}), example) for line, example in enumerate(examples, start=1)]
    return render(rows, tokenizer, {tokenizer.eos_token_id}, DataRecipe(**data), Limit(max_seq_length))


def sample(tokenizer: Any, example: Example, **data: Any) -> Sample:
    (only,) = rendered(tokenizer, example, **data).samples
    return only


def refusal(tokenizer: Any, example: Example, **data: Any) -> str:
    with pytest.raises(DataError) as caught:
        rendered(tokenizer, example, **data)
    return str(caught.value)


def learned(tokenizer: Any, sample: Sample) -> list[str]:
    """The texts of the stretches of supervised tokens."""
    stretches: list[list[int]] = [[]]
    for token, trained in zip(sample.tokens, sample.trained, strict=True):
        if trained:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def marker(tokenizer: Any) -> str:
    return "<|end|>" if "<|end|>" in tokenizer.added_tokens_encoder else str(tokenizer.eos_token)


def asked(tokenizer: Any, chat: Chat) -> list[int]:
    """The tokens that ask a model for the last answer of `chat`, as transformers makes them."""
    return list(tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, return_dict=False))


def is_mistral(tokenizer: Any) -> bool:
    """Its template trims answers, puts a space before them, and the system prompt before the last question."""
    return "[INST]" in tokenizer.added_tokens_encoder


TURNS = [
    ("user", "Grüße aus Köln\n\nund 你好 🙂"),
    ("assistant", "Hallo 🙂, 你好!\n\n- eins\n- zwei 👩‍👩‍👧"),
    ("user", "  spaces  \n"),
    ("assistant", "Ünïcödé é ①"),
    ("user", "再见"),
    ("assistant", "🏳️‍🌈"),
]


def test_every_answer_and_its_end_of_turn_are_learned_and_nothing_else(tokenizer: Any) -> None:
    example = chat(*TURNS)
    found = sample(tokenizer, example)
    space = " " if is_mistral(tokenizer) else ""
    answers = [content for role, content in TURNS if role == "assistant"]
    assert learned(tokenizer, found) == [f"{space}{answer}{marker(tokenizer)}" for answer in answers]
    assert found.tokens[: found.prompt_length] == asked(tokenizer, example)
    assert (found.where, found.answer) == ("chats.jsonl:1", "🏳️‍🌈")


def test_a_system_prompt_is_not_learned(tokenizer: Any) -> None:
    example = chat(("system", "Be brief. 🙂"), *TURNS)
    if is_mistral(tokenizer):  # its template writes the system prompt into the last question, and only to ask
        samples = rendered(tokenizer, example).samples
        assert [each.answer for each in samples] == [content for role, content in TURNS if role == "assistant"]
        for number, each in enumerate(samples, start=1):
            assert learned(tokenizer, each) == [f" {each.answer}</s>"]
            assert each.tokens[: each.prompt_length] == asked(tokenizer, Chat(example.messages[: 2 * number + 1]))
            assert each.notes == (f"answer {number} of 3, in a sample of its own",)
        return
    found = sample(tokenizer, example)
    answers = [content for role, content in TURNS if role == "assistant"]
    assert learned(tokenizer, found) == [f"{answer}{marker(tokenizer)}" for answer in answers]
    assert found.tokens[: found.prompt_length] == asked(tokenizer, example)


def test_the_whole_of_a_sample_by_hand() -> None:
    found = sample(TINY, chat(("user", "a"), ("assistant", " b\n"), ("user", "c"), ("assistant", "🙂")))
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n b\n<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    assert TINY.decode(found.tokens) == f"{text}<|im_start|>assistant\n🙂<|im_end|>\n"
    pieces = TINY.convert_ids_to_tokens(found.tokens)
    # the smiley is four tokens, one a byte, all of the same character
    assert pieces[found.prompt_length :] == ["ð", "Ł", "Ļ", "Ĥ", "<|im_end|>", "Ċ"]
    assert found.trained[found.prompt_length :] == [True] * 5 + [False]
    assert learned(TINY, found) == [" b\n<|im_end|>", "🙂<|im_end|>"]
    assert found.trained_count == len(TINY.encode(" b\n")) + 1 + 5


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("answer", [" b", "b  ", "b\n", "\tb", "\n\nb", "\u3000b", " 🙂 ", "b \n c"])
def test_white_space_around_an_answer_is_kept(name: str, answer: str, shared_assets: Path) -> None:
    tokenizer = load(shared_assets / "tokenizers" / name)
    example = chat(("user", "a"), ("assistant", answer))
    found = sample(tokenizer, example)
    kept = {
        "mistral-v3": f" {answer.strip()}",  # its template trims
        "ort-phi-3-mini": answer.lstrip(),  # <|assistant|> takes all white space behind it with it
    }.get(name, answer)
    assert learned(tokenizer, found) == [kept + marker(tokenizer)]
    assert found.tokens[: found.prompt_length] == asked(tokenizer, example)


def test_phi_3s_text_ends_with_an_end_of_text_that_is_not_learned(shared_assets: Path) -> None:
    phi = load(shared_assets / "tokenizers" / "ort-phi-3-mini")
    found = sample(phi, chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    pieces = phi.convert_ids_to_tokens(found.tokens)
    assert pieces[-3:] == ["d", "<|end|>", "<|endoftext|>"]
    assert found.trained[-3:] == [True, True, False]
    assert learned(phi, found) == ["b<|end|>", "d<|end|>"]
    assert learned(phi, sample(phi, chat(("user", "a"), ("assistant", "b")), mask_prompt=False)) == [
        phi.decode(
            phi.encode("<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|endoftext|>", add_special_tokens=False)[1:]
        )
    ]


def test_an_answer_that_merges_with_the_prompt_is_asked_for_with_the_prompt_s_own_tokens() -> None:
    """A prompt that ends with a space is asked with as it is: the answer behind it cannot begin with " the"."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    trimmed = with_template(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    # byte-level tokenizers may leave a token's leading space out of its offsets; " the" must not pass for "the"
    trimmed.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True, add_prefix_space=False)
    assert trimmed(" the", return_offsets_mapping=True)["offset_mapping"] == [(1, 4)]
    example = chat(("user", "a"), ("assistant", "the"), ("user", "c"), ("assistant", "🙂"))
    merged, shared = rendered(trimmed, example).samples  # " 🙂" is " " and the smiley
    assert merged.tokens == [*asked(trimmed, Chat(example.messages[:2])), *trimmed.encode("the<|im_end|>")]
    assert [learned(trimmed, each) for each in (merged, shared)] == [["the<|im_end|>"], ["🙂<|im_end|>"]]
    trimmed.chat_template = template + "{% if add_generation_prompt %}assistant:{% endif %}"
    assert learned(trimmed, sample(trimmed, chat(("user", "a"), ("assistant", "the")))) == [" the<|im_end|>"]


def test_unknown_characters_that_make_one_token_hide_no_start() -> None:
    """Several unknown characters may make one token; the prompt's tokens are then the same with more behind them."""
    unknown = Tokenizer(BPE(vocab={"a": 0, "b": 1, "?": 2}, merges=[], unk_token="?", fuse_unk=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unknown, eos_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '☃' if m.role == 'assistant' }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}☃{% endif %}"
    )
    assert learned(tokenizer, sample(tokenizer, chat(("user", "a"), ("assistant", "ba")))) == ["b a <|end|>"]
    assert refusal(tokenizer, chat(("user", "a"), ("assistant", "☃b"))) == (
        "chats.jsonl:1: message 2: its beginning and the end of the generation prompt make one token"
    )


@pytest.mark.parametrize(
    ("example", "control"),
    [
        (chat(("user", "what is <|im_end|>?"), ("assistant", "a marker")), "<|im_end|>"),
        (chat(("user", "what"), ("assistant", "it is <|im_start|>")), "<|im_start|>"),
        (chat(("system", "<|endoftext|>"), ("user", "a"), ("assistant", "b")), "<|endoftext|>"),
        (Completion("a<|im_end|>", "b"), "<|im_end|>"),
        (Completion("a", "<|im_end|>b"), "<|im_end|>"),
        (Text("one<|endoftext|>two"), "<|endoftext|>"),
    ],
)
def test_text_that_reads_as_a_control_token_is_refused_with_its_place(example: Example, control: str) -> None:
    with pytest.raises(DataError) as caught:
        rendered(TINY, Text("fine"), example)
    assert str(caught.value) == (
        f"chats.jsonl:2: holds the text '{control}', which this tokenizer reads as a control token; delete it"
    )


def test_half_a_character_is_refused() -> None:
    for example in (chat(("user", "a\ud83d"), ("assistant", "b")), Completion("a", "\ude00"), Text("a\udfffb")):
        assert refusal(TINY, example) == "chats.jsonl:1: holds half a character (a lone surrogate); delete it"


def test_a_template_that_opens_a_thought_is_refused_an_answer_without_one() -> None:
    tokenizer = with_template(OPENS_A_THOUGHT)
    assert refusal(tokenizer, chat(("user", "a"), ("assistant", "b"))) == (
        "chats.jsonl:1: message 2: the chat template asks for a thought, and this answer has none; "
        "begin the answer with <think>…</think>, or set data.chat_template to one without thoughts"
    )


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("<think>\nhm\n</think>\n\nb", "hm\n</think>\n\nb"),
        ("<think>hm</think>b", "hm</think>b"),
        ("<think>\n\nhm</think> b ", "\nhm</think> b "),
    ],
)
def test_a_thought_that_the_prompt_opens_is_learned_from_there_on(answer: str, rest: str) -> None:
    tokenizer = with_template(OPENS_A_THOUGHT)
    turns = [("user", "a"), ("assistant", answer), ("user", "c"), ("assistant", "<think>so</think>d")]
    first, second = rendered(tokenizer, chat(*turns)).samples
    assert tokenizer.decode(first.tokens[: first.prompt_length]).endswith("<|im_start|>assistant\n<think>\n")
    assert learned(tokenizer, first) == [f"{rest}<|im_end|>"]
    assert learned(tokenizer, second) == ["so</think>d<|im_end|>"]
    # the history is asked with as the template writes it: without its thought
    assert "hm" not in tokenizer.decode(second.tokens)
    assert second.tokens[: second.prompt_length] == asked(tokenizer, chat(*turns))
    (last,) = rendered(tokenizer, chat(*turns), learn="last").samples
    assert (last.tokens, last.trained) == (second.tokens, second.trained)


def test_a_template_that_can_ask_without_a_thought_does() -> None:
    tokenizer = with_template(EMPTY_THOUGHT)
    found = sample(tokenizer, chat(("user", "a"), ("assistant", "b")))
    assert learned(tokenizer, found) == ["b<|im_end|>"]
    asks = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(found.tokens[: found.prompt_length]) == asks
    # an earlier answer stands there without the thought that the model is asked with: it gets a sample of its own
    first, second = rendered(
        tokenizer, chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ).samples
    assert tokenizer.decode(first.tokens) == f"{asks}b<|im_end|>\n"
    assert [learned(tokenizer, each) for each in (first, second)] == [["b<|im_end|>"], ["d<|im_end|>"]]
    assert tokenizer.decode(second.tokens).startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    )


def test_without_the_mask_an_answer_must_stand_in_the_whole_text() -> None:
    tokenizer = with_template(EMPTY_THOUGHT)
    weighed = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    weighed.messages[1]["weight"] = 0
    assert refusal(tokenizer, weighed, mask_prompt=False) == (
        "chats.jsonl:1: message 2: the chat template writes it otherwise in the whole conversation; "
        "leave data.mask_prompt on, or split the conversation"
    )


def test_thoughts_of_their_own_are_learned(shared_assets: Path) -> None:
    """`reasoning_content` as Qwen3's template writes it; a template that leaves it out is refused."""
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"}])
    tokenizer = with_template(thinks)
    assert learned(tokenizer, sample(tokenizer, row)) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert refusal(TINY, row) == "chats.jsonl:1: message 2: the chat template changes this answer"


CALLS = [
    {"role": "user", "content": "Rain in Köln and Ürümqi?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
            {"id": "abcdefgh2", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ürümqi"}}},
        ],
    },
    {"role": "tool", "content": "yes", "tool_call_id": "abcdefgh1", "name": "weather"},
    {"role": "tool", "content": "no", "tool_call_id": "abcdefgh2", "name": "weather"},
    {"role": "assistant", "content": "Only in Köln."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        (
            "qwen2.5-0.5b-instruct",
            "<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "weather", "arguments": {"city": "Ürümqi"}}\n</tool_call><|im_end|>',
        ),
        (
            "mistral-v3",
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}, "id": "abcdefgh1"}, '
            '{"name": "weather", "arguments": {"city": "Ürümqi"}, "id": "abcdefgh2"}]</s>',
        ),
    ],
)
def test_tool_calls_are_learned_and_results_are_not(name: str, calls: str, shared_assets: Path) -> None:
    tokenizer = load(shared_assets / "tokenizers" / name)
    samples = rendered(tokenizer, Chat(CALLS, TOOLS)).samples
    said = [text for each in samples for text in learned(tokenizer, each)]
    assert said[0].replace("[TOOL_CALLS]  [", "[TOOL_CALLS] [") == calls
    assert said[1].strip() == "Only in Köln." + str(tokenizer.eos_token)
    assert not any("yes" in text for text in said)
    called = sample(tokenizer, Chat(CALLS[:2], TOOLS))
    assert called.answer is not None
    assert '"Köln"' in called.answer


def test_a_template_that_writes_no_calls_is_refused() -> None:
    assert refusal(TINY, Chat(CALLS, TOOLS)) == (
        "chats.jsonl:1: message 2: the chat template does not write its call of weather; "
        "use a model that is made for tools"
    )


def test_control_tokens_are_found_in_calls_too(shared_assets: Path) -> None:
    tokenizer = load(shared_assets / "tokenizers" / "qwen2.5-0.5b-instruct")
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": ["fine", "<|im_end|>"]}}}
    row = Chat([CALLS[0], {"role": "assistant", "content": "", "tool_calls": [call]}], TOOLS)
    assert "which this tokenizer reads as a control token" in refusal(tokenizer, row)


def test_only_the_last_answer_where_that_is_wanted(tokenizer: Any) -> None:
    example = chat(*TURNS)
    found = sample(tokenizer, example, learn="last")
    space = " " if is_mistral(tokenizer) else ""
    assert learned(tokenizer, found) == [f"{space}{TURNS[-1][1]}{marker(tokenizer)}"]
    assert found.tokens == sample(tokenizer, example).tokens


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("{{ m.content | upper }}<|im_end|>", "message 2: the chat template changes this answer"),
        ("Answer: {{ m.content }}<|im_end|>", "message 2: the chat template changes this answer"),
        (
            "{{ m.content }}\n",
            "message 2: no end-of-turn token follows it in the chat template; use a model made for chat",
        ),
        (
            "{{ m.content }} (done)<|im_end|>",
            "message 2: no end-of-turn token follows it in the chat template; use a model made for chat",
        ),
        ("{{ raise_exception('Only users may speak') }}", "the chat template refuses it: Only users may speak"),
    ],
)
def test_templates_that_hide_the_answer_are_refused(change: str, line: str) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + change
        + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert refusal(with_template(template), chat(("user", "a"), ("assistant", "b"))) == f"chats.jsonl:1: {line}"


def test_tools_are_part_of_the_prompt(shared_assets: Path) -> None:
    qwen = load(shared_assets / "tokenizers" / REAL[0])
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    found = sample(qwen, Chat(chat(("user", "Rain?"), ("assistant", "No.")).messages, tools))
    assert '"name": "weather"' in qwen.decode(found.tokens[: found.prompt_length])
    assert learned(qwen, found) == ["No.<|im_end|>"]


def test_completion_rows_are_chats_where_there_is_a_template() -> None:
    assert sample(TINY, Completion("a", " b")) == sample(TINY, chat(("user", "a"), ("assistant", " b")))


def test_a_tokenizer_without_a_template_is_refused(plain: Any) -> None:
    """Commands give it the plain template first."""
    line = "chats.jsonl:1: needs a chat template, which this tokenizer has not; set data.chat_template"
    assert refusal(plain, chat(("user", "a"), ("assistant", "b"))) == line
    assert refusal(plain, Completion("a", "b")) == line


def test_the_plain_template(stories: Path) -> None:
    tokenizer, template = load_for_rows(stories, read_json(stories / "config.json"))
    assert template == PLAIN_TEMPLATE
    plain = inner(tokenizer)
    found = sample(plain, chat(("system", "Be kind."), ("user", "My card?"), ("assistant", "It is on its way.")))
    text = "<s>### System:\nBe kind.\n\n### User:\nMy card?\n\n### Assistant:\nIt is on its way.</s>\n\n"
    assert plain("".join(text), add_special_tokens=False)["input_ids"] == found.tokens
    assert learned(plain, found) == ["It is on its way.</s>"]
    assert 2 in tokenizer.eos_token_ids


def test_a_template_of_its_own_stays(tiny: Path) -> None:
    config = read_json(tiny / "config.json")
    assert load_for_rows(tiny, config)[1] is None
    tokenizer, template = load_for_rows(tiny, config, OPENS_A_THOUGHT)
    assert template == inner(tokenizer).chat_template == OPENS_A_THOUGHT


def test_text_is_learned_whole_but_for_its_first_token(plain: Any) -> None:
    found = sample(plain, Text("Once upon"))
    assert found.tokens == [*plain.encode("Once upon"), plain.eos_token_id]
    assert found.trained == [False] + [True] * (len(found.tokens) - 1)
    assert (found.prompt_length, found.answer) == (0, None)


def test_a_tokenizer_that_adds_the_end_itself_adds_it_once(plain: Any) -> None:
    ending = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(plain.backend_tokenizer.to_str()), eos_token="</s>"
    )
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert ending.encode("Once")[-1] == 2
    assert sample(ending, Text("Once upon")).tokens.count(2) == 1


def test_a_tokenizer_without_an_end_is_refused_for_plain_text() -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(TINY.backend_tokenizer.to_str()))
    line = "chats.jsonl:1: needs an end-of-text token, which this tokenizer does not name"
    assert refusal(endless, Text("one")) == line


def test_mask_prompt_false_learns_every_token(tokenizer: Any) -> None:
    masked = sample(tokenizer, chat(*TURNS))
    whole = sample(tokenizer, chat(*TURNS), mask_prompt=False)
    assert whole.trained == [False] + [True] * (len(whole.tokens) - 1)
    assert (whole.tokens, whole.prompt_length, whole.answer) == (masked.tokens, masked.prompt_length, masked.answer)


def test_rows_that_are_too_long() -> None:
    examples = [Text("a"), Text("a b c d e f"), Text("b"), Text("a b c d e f g h")]
    lengths = [len(TINY.encode(each.text)) + 1 for each in examples]
    assert lengths[0] <= 3 < lengths[1] < lengths[3]
    with pytest.raises(DataError) as caught:
        rendered(TINY, *examples, max_seq_length=3)
    assert str(caught.value) == (
        f"chats.jsonl:4: has {lengths[3]} tokens, more than train.max_seq_length 3 (2 such rows); "
        f"set max_seq_length to {lengths[3]}, or data.too_long to drop or truncate"
    )
    dropped = rendered(TINY, *examples, max_seq_length=3, too_long="drop")
    assert [each.where for each in dropped.samples] == ["chats.jsonl:1", "chats.jsonl:3"]
    assert dropped.too_long == ["chats.jsonl:2", "chats.jsonl:4"]
    assert len(rendered(TINY, *examples, max_seq_length=lengths[3]).samples) == 4  # exactly as long is allowed


def test_the_model_s_context_is_a_limit_too() -> None:
    assert Limit.of(2048, None) == Limit.of(2048, 4096) == Limit(2048)
    rows = [(Row("chats.jsonl", 1, {}), Text("a b c d e f"))]
    with pytest.raises(DataError) as caught:
        render(rows, TINY, {2}, DataRecipe(), Limit.of(2048, 3))
    assert "more than the model's context of 3 (1 such rows); set data.too_long to drop or truncate" in str(
        caught.value
    )


def test_prompts_are_cut_from_the_left() -> None:
    example = chat(("system", "Be kind. " * 20), ("user", "one two three"), ("assistant", "four five"))
    whole = sample(TINY, example)
    answer = len(whole.tokens) - whole.prompt_length
    for limit in (answer + 1, answer + 7, len(whole.tokens) - 1):
        found = rendered(TINY, example, max_seq_length=limit, too_long="truncate")
        (cut,) = found.samples
        assert (cut.tokens, cut.trained) == (whole.tokens[-limit:], whole.trained[-limit:])
        assert cut.prompt_length == limit - answer
        assert cut.notes == (f"{len(whole.tokens) - limit} tokens cut from the left of the prompt",)
        assert found.cut == ["chats.jsonl:1"]
        assert found.losses == "1 cut to fit"
    # the answer is never cut, nor the token that asks for its first one
    lost = rendered(TINY, example, max_seq_length=answer, too_long="truncate")
    assert (lost.samples, lost.too_long, lost.losses) == ([], ["chats.jsonl:1"], "1 too long, left out")


def test_a_beginning_of_text_token_stays_where_a_prompt_is_cut(shared_assets: Path) -> None:
    mistral = load(shared_assets / "tokenizers" / "mistral-v3")
    whole = sample(mistral, chat(("user", "a b c d e f g h"), ("assistant", "i")))
    (cut,) = rendered(
        mistral, chat(("user", "a b c d e f g h"), ("assistant", "i")), max_seq_length=8, too_long="truncate"
    ).samples
    assert cut.tokens == [mistral.bos_token_id, *whole.tokens[-7:]]
    assert learned(mistral, cut) == learned(mistral, whole)


def test_a_long_conversation_is_cut_answer_by_answer() -> None:
    turns = [each for n in range(6) for each in (("user", f"question {n} " * 5), ("assistant", f"answer {n}"))]
    found = rendered(TINY, chat(*turns), max_seq_length=60, too_long="truncate")
    assert [learned(TINY, each) for each in found.samples] == [[f"answer {n}<|im_end|>"] for n in range(6)]
    assert all(len(each.tokens) <= 60 for each in found.samples)


def test_a_long_text_becomes_pieces_that_lose_nothing() -> None:
    whole = sample(TINY, Text("one two three four five six seven"))
    found = rendered(TINY, Text("one two three four five six seven"), max_seq_length=5, too_long="truncate")
    assert [token for each in found.samples for token in each.tokens[1:]] == whole.tokens[1:]
    assert sum(each.trained_count for each in found.samples) == whole.trained_count
    assert all(len(each.tokens) <= 5 for each in found.samples)
    assert found.samples[0].notes == (f"piece 1 of {len(found.samples)}: cut to fit",)


def test_a_row_with_nothing_to_learn_is_counted() -> None:
    found = rendered(with_template(None), Text("a"), Text("a b"))
    assert (len(found.samples), found.empty) == (2, [])
    endless = rendered(TINY, Text("a"))
    assert endless.samples[0].trained_count == 1


def test_progress_is_told_a_row() -> None:
    told: list[int] = []
    rows = [(Row("chats.jsonl", 1, {}), Text("a")), (Row("chats.jsonl", 2, {}), Text("b"))]
    render(rows, TINY, {2}, DataRecipe(), Limit(10), told.append)
    assert told == [1, 2]


CONTENT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\té🙂你\u0301\u200d1aB<|>")), max_size=12
)
CONVERSATION = st.tuples(
    st.booleans(), st.lists(st.tuples(CONTENT, CONTENT.filter(lambda text: bool(text.strip()))), min_size=1, max_size=3)
)


def as_chat(conversation: tuple[bool, list[tuple[str, str]]]) -> Chat:
    system, turns = conversation
    said = [each for question, answer in turns for each in (("user", question), ("assistant", answer))]
    return chat(*([("system", "Be kind.")] if system else []), *said)


@settings(max_examples=150, deadline=None)
@given(CONVERSATION)
def test_any_chat_on_the_embedded_tokenizer(conversation: tuple[bool, list[tuple[str, str]]]) -> None:
    example = as_chat(conversation)
    found = sample(TINY, example)
    assert learned(TINY, found) == [f"{answer}<|im_end|>" for _, answer in conversation[1]]
    assert found.tokens[: found.prompt_length] == asked(TINY, example)


@pytest.mark.parametrize("name", REAL[:1])
@settings(max_examples=60, deadline=None)
@given(conversation=CONVERSATION)
def test_any_chat_on_a_real_tokenizer_is_exact(
    name: str, shared_assets: Path, conversation: tuple[bool, list[tuple[str, str]]]
) -> None:
    tokenizer = load(shared_assets / "tokenizers" / name)
    example = as_chat(conversation)
    samples = rendered(tokenizer, example).samples
    expected = sorted(unicodedata.normalize("NFC", f"{answer}<|im_end|>") for _, answer in conversation[1])
    assert sorted(text for each in samples for text in learned(tokenizer, each)) == expected
    assert samples[-1].tokens[: samples[-1].prompt_length] == asked(tokenizer, example)


WEIGHED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one", "weight": 0},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two", "weight": 1},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "three", "weight": 0},
]


def test_an_answer_of_weight_0_is_context(tokenizer: Any) -> None:
    plain = [{"role": each["role"], "content": each["content"]} for each in WEIGHED]
    found, whole = sample(tokenizer, Chat(WEIGHED)), sample(tokenizer, Chat(plain))
    assert found.tokens == whole.tokens
    space = " " if is_mistral(tokenizer) else ""
    assert learned(tokenizer, found) == [f"{space}two{marker(tokenizer)}"]
    assert (found.answer, found.prompt_length) == ("two", len(asked(tokenizer, Chat(plain[:4]))))
    # without the mask it is still not learned: all else is, but for the first token
    unmasked = sample(tokenizer, Chat(WEIGHED), mask_prompt=False)
    turns = [at for at, trained in enumerate(whole.trained) if trained and not found.trained[at]]
    assert [at for at, trained in enumerate(unmasked.trained) if not trained] == [0, *turns]
    assert (unmasked.answer, unmasked.prompt_length) == (found.answer, found.prompt_length)


def test_the_template_does_not_see_weights() -> None:
    spells = "{% for m in messages %}{{ m.keys() | list }}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = with_template(spells + "{% if add_generation_prompt %}['role', 'content']{% endif %}")
    assert "weight" not in tokenizer.decode(sample(tokenizer, Chat(WEIGHED[:4])).tokens)


def test_a_chat_without_a_learned_answer_is_refused() -> None:
    for mask_prompt in (True, False):
        assert refusal(TINY, Chat(WEIGHED[:2]), mask_prompt=mask_prompt).startswith(
            "chats.jsonl:1: has no token to learn"
        )


class Slow:
    """The embedded tokenizer as one of Python code, which tells no places of its tokens."""

    is_fast = False

    def __getattr__(self, name: str) -> Any:
        return getattr(TINY, name)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        rendered(Slow(), chat(("user", "a"), ("assistant", "b")))
    assert str(caught.value) == (f"{TINY.name_or_path}: has no fast tokenizer (tokenizer.json), which exact masks need")


def test_rows_with_control_tokens_are_counted() -> None:
    rows = [Text("fine"), Text("<|im_end|>"), Completion("a", "<|im_start|>"), Text("fine"), Text("b<|endoftext|>")]
    with pytest.raises(DataError) as caught:
        rendered(TINY, *rows)
    assert str(caught.value) == (
        "chats.jsonl:2: holds the text '<|im_end|>', which this tokenizer reads as a control token "
        "(and 2 more such rows); delete it"
    )

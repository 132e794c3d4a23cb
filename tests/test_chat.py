"""Conversations: each answer is the one that a new conversation would give, and only new tokens are fed."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtune import chat, generate, model
from mlxtune.data.files import read_rows
from mlxtune.data.formats import Chat, to_example
from mlxtune.errors import InputError, ModelError, OutputError
from mlxtune.generate import Piece
from mlxtune.model import LanguageModel
from mlxtune.recipe import DataRecipe
from mlxtune.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def lm(tiny: Path) -> LanguageModel:
    return model.load(tiny)


def copy_with(source: Path, target: Path, file: str, **values: Any) -> LanguageModel:
    """A copy of a model folder with other values in one of its JSON files."""
    shutil.copytree(source, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | values))
    return model.load(target)


def fresh(lm: LanguageModel, messages: list[chat.Message], max_tokens: int) -> str:
    """The greedy answer to a whole history, fed at once into an empty cache."""
    pieces = generate.stream(lm, generate.prompt_tokens(lm, messages), max_tokens=max_tokens)
    return "".join(piece.text for piece in pieces)


def shared_length(one: list[int], other: list[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def heard(talk: chat.Conversation, pieces: Any) -> list[Piece]:
    """All pieces of an answer, and the proof that the cache then holds the rendering of the history, no more."""
    before = list(talk.cache.tokens)
    found = list(pieces)
    rendering = generate.prompt_tokens(talk.lm, talk.messages[:-1])
    fed = len(rendering) - min(shared_length(before, rendering), len(rendering) - 1)
    assert {piece.prompt_tokens for piece in found} == {fed}
    assert talk.cache.tokens == rendering + [piece.token for piece in found]
    assert all(layer.offset == len(talk.cache.tokens) for layer in talk.cache.layers)
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(piece.text for piece in found)}
    return found


def answer(talk: chat.Conversation, text: str) -> str:
    return "".join(piece.text for piece in heard(talk, talk.say(text)))


class Breaking(nn.Module):
    """A network that is interrupted at its n-th step."""

    def __init__(self, net: nn.Module, step: int):
        super().__init__()
        self.net, self.step, self.layers = net, step, net.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.step -= 1
        if self.step == 0:
            raise KeyboardInterrupt
        return self.net(tokens, cache=cache)


def test_each_turn_feeds_only_what_is_new(lm: LanguageModel) -> None:
    talk = chat.Conversation(lm, system="You label tickets. " * 10, max_tokens=12)
    renderings, fed = [], []
    for text in ("Where is my card?", "And my refund?", "Thank you!"):
        previous = generate.prompt_tokens(lm, [*talk.messages, {"role": "user", "content": "x"}])
        pieces = heard(talk, talk.say(text))
        assert talk.messages[-1]["content"] == fresh(lm, talk.messages[:-1], 12)
        renderings.append(len(previous))
        fed.append(pieces[0].prompt_tokens)
    # the system prompt is fed once: what is fed later is a turn, an answer at most, and the template around them
    assert fed[0] > 80
    assert max(fed[1:]) < 12 + 30
    assert sum(fed) < sum(renderings) / 2


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_the_answer_is_that_of_a_new_conversation(lm: LanguageModel, seed: int) -> None:
    chooser = random.Random(seed)
    talk = chat.Conversation(lm, max_tokens=8)
    history: list[chat.Message] = []
    system: list[chat.Message] = []
    for number in range(14):
        action = chooser.choice(["say", "say", "say", "retry", "undo", "clear", "system", "stop"])
        if action == "say" or not history:
            user = {"role": "user", "content": f"Question {number}: where is my card?"}
            expected = fresh(lm, [*system, *history, user], 8)
            assert answer(talk, user["content"]) == expected
            history += [user, {"role": "assistant", "content": expected}]
        elif action == "retry":
            history[-1]["content"] = fresh(lm, [*system, *history[:-1]], 8)
            heard(talk, talk.retry())
        elif action == "stop":
            user = {"role": "user", "content": f"Stop {number}"}
            pieces = talk.say(user["content"])
            said = [piece.text for _, piece in zip(range(3), pieces, strict=False)]
            pieces.close()
            history += [user, {"role": "assistant", "content": "".join(said)}]
        elif action == "undo":
            assert talk.undo() == history[-2]["content"]
            del history[-2:]
        elif action == "clear":
            talk.clear()
            history = []
        else:
            text = chooser.choice([None, "Be kind.", "Be brief."])
            talk.set_system(text)
            system = [{"role": "system", "content": text}] if text else []
        assert talk.messages == [*system, *history]


def test_a_stopped_answer_is_kept_as_said(lm: LanguageModel) -> None:
    talk = chat.Conversation(lm, max_tokens=20)
    pieces = talk.say("Where is my card?")
    said = next(pieces).text + next(pieces).text
    pieces.close()
    assert talk.messages == [
        {"role": "user", "content": "Where is my card?"},
        {"role": "assistant", "content": said},
    ]
    assert answer(talk, "Go on.") == fresh(lm, talk.messages[:-1], 20)


def test_an_interrupt_within_a_step_keeps_what_was_said(lm: LanguageModel) -> None:
    talk = chat.Conversation(dataclasses.replace(lm, net=Breaking(lm.net, 5)), max_tokens=20)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for piece in talk.say("Where is my card?"):
            seen.append(piece.text)
    assert len(seen) == 2  # five steps: two for the prompt, and each token is fed before it is shown
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(seen)}
    assert answer(talk, "Go on.") == fresh(lm, talk.messages[:-1], 20)


def test_an_answer_that_is_never_begun_changes_nothing(lm: LanguageModel) -> None:
    talk = chat.Conversation(lm)
    talk.say("Where is my card?").close()
    assert talk.messages == []


def test_a_full_context_is_said_and_left(lm: LanguageModel) -> None:
    talk = chat.Conversation(lm, max_tokens=8)
    answer(talk, "Where is my card?")
    before = talk.messages
    with pytest.raises(InputError) as caught:
        talk.say("card " * 600)
    length = len(generate.prompt_tokens(lm, [*before, {"role": "user", "content": "card " * 600}]))
    assert str(caught.value) == (
        f"the model's context of 512 tokens is full: {length:,} are taken; "
        "start again with /clear, or take turns back with /undo"
    )
    assert talk.messages == before
    assert answer(talk, "And now?") == fresh(lm, talk.messages[:-1], 8)


def test_an_answer_is_cut_to_the_room_that_is_left(lm: LanguageModel) -> None:
    user = {"role": "user", "content": ""}
    while len(generate.prompt_tokens(lm, [user])) < 480:
        user["content"] += " card" * 5
    left = 512 - len(generate.prompt_tokens(lm, [user]))
    tokenizer = load_tokenizer(lm.path, lm.config)
    tokenizer.eos_token_ids = set()
    talk = chat.Conversation(dataclasses.replace(lm, tokenizer=tokenizer), max_tokens=256)
    pieces = heard(talk, talk.say(user["content"]))
    assert 16 <= left <= 32
    assert (len(pieces), pieces[-1].finish_reason) == (left, "length")


def test_the_system_prompt_may_be_refused_and_removed(tiny: Path, tmp_path: Path) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = refusal + "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    lm = copy_with(tiny, tmp_path / "copy", "tokenizer_config.json", chat_template=template)
    talk = chat.Conversation(lm, system="Be kind.", max_tokens=4)
    with pytest.raises(ModelError, match="no system role"):
        talk.say("Hi")
    assert talk.messages == [{"role": "system", "content": "Be kind."}]
    talk.set_system("  ")
    answer(talk, "Hi")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_a_model_with_a_sliding_window_answers_alike(tiny: Path, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    lm = copy_with(tiny, tmp_path / "copy", "config.json", layer_types=kinds, sliding_window=16)
    talk = chat.Conversation(lm, max_tokens=8)
    for action in ("say", "say", "retry", "undo", "say"):
        if action == "undo":
            talk.undo()
            continue
        list(talk.retry() if action == "retry" else talk.say("Where is my card?"))
        assert talk.messages[-1]["content"] == fresh(lm, talk.messages[:-1], 8)


def test_a_retry_draws_anew_and_a_conversation_can_be_repeated(lm: LanguageModel) -> None:
    def conversation(seed: int) -> list[str]:
        talk = chat.Conversation(lm, max_tokens=12, temp=2.0, seed=seed)
        answers = [answer(talk, "Where is my card?")]
        for _ in range(2):
            list(talk.retry())
            answers.append(talk.messages[-1]["content"])
        return answers

    first = conversation(0)
    assert len(set(first)) == 3
    assert conversation(0) == first
    assert conversation(5) != first


def test_nothing_to_say_retry_or_undo(lm: LanguageModel) -> None:
    talk = chat.Conversation(lm)
    for act, message in [
        (lambda: talk.say(" \n"), "there is nothing to say"),
        (talk.retry, "there is no answer to retry"),
        (talk.undo, "there is nothing to undo"),
    ]:
        with pytest.raises(InputError, match=message):
            act()


def test_a_model_without_template_cannot_chat(stories: Path, lm: LanguageModel) -> None:
    chat.check(lm.path)
    with pytest.raises(ModelError, match="has no chat template"):
        chat.check(stories)
    with pytest.raises(ModelError, match="has no chat template"):
        chat.Conversation(model.load(stories))


def test_a_template_in_a_file_of_its_own_is_found(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    settings = tmp_path / "copy" / "tokenizer_config.json"
    value = json.loads(settings.read_text())
    template = value.pop("chat_template")
    settings.write_text(json.dumps(value))
    with pytest.raises(ModelError, match="has no chat template"):
        chat.check(tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text(template)
    chat.check(tmp_path / "copy")


# saving


def test_a_saved_conversation_is_a_row_of_training_data(lm: LanguageModel, tmp_path: Path) -> None:
    talk = chat.Conversation(lm, system="Sei nett.", max_tokens=8)
    talk.turns = [
        {"role": "user", "content": "Wo ist\nmeine „Karte“?"},
        {"role": "assistant", "content": "Auf dem Weg."},
        {"role": "user", "content": "stopped at once"},
        {"role": "assistant", "content": " "},
    ]
    path = tmp_path / "new" / "talk.jsonl"
    assert talk.save(path) == 1
    assert path.read_text(encoding="utf-8") == (
        '{"messages": [{"role": "system", "content": "Sei nett."}, '
        '{"role": "user", "content": "Wo ist\\nmeine „Karte“?"}, '
        '{"role": "assistant", "content": "Auf dem Weg."}]}\n'
    )
    (row,) = read_rows(path)
    example = to_example(row, DataRecipe())
    assert isinstance(example, Chat) and example.messages == talk.messages[:3]
    assert [each.name for each in path.parent.iterdir()] == ["talk.jsonl"]


def test_what_cannot_be_saved(lm: LanguageModel, tmp_path: Path) -> None:
    talk = chat.Conversation(lm, system="Be kind.")
    with pytest.raises(InputError, match="there is no answer to save yet"):
        talk.save(tmp_path / "talk.jsonl")
    talk.turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for name in ("talk.json", "talk", ""):
        with pytest.raises(OutputError, match=r"is not named \.jsonl; name it like talk\.jsonl"):
            talk.save(tmp_path / name)
    (tmp_path / "talk.jsonl").write_text("mine\n")
    with pytest.raises(OutputError, match="exists already"):
        talk.save(tmp_path / "talk.jsonl")
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"talk.jsonl": "mine\n"}

"""Random chats on every kind of template, against the templates spelt out by hand in scripts/bench_masks.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtune.data.files import Row
from mlxtune.data.formats import Chat
from mlxtune.data.render import Limit, render
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


masks = script("bench_masks")
OWN = masks.cases(None)


@pytest.mark.parametrize("name", OWN)
def test_no_token_is_wrong(name: str) -> None:
    figures = masks.check(OWN[name], count=60, seed=1, peer=False)
    assert figures["rows"] > 50
    assert figures["wrong_tokens"] == 0
    assert figures["refused"] == {}


def test_no_token_is_wrong_on_real_tokenizers(shared_assets: Path) -> None:
    for name, case in masks.cases(shared_assets / "tokenizers").items():
        if name not in OWN:
            figures = masks.check(case, count=60, seed=2, peer=False)
            assert figures["rows"] > 50
            assert figures["wrong_tokens"] == 0
            assert sum(figures["refused"].values()) <= 1


def test_the_templates_by_hand_can_tell_a_wrong_mask() -> None:
    """A check that cannot fail proves nothing."""
    case = OWN["chatml (embedded)"]
    messages = next(masks.chats(1, 0, "none"))
    row = Row("chats.jsonl", 1, {})
    (sample,) = render([(row, Chat(messages))], case.tokenizer, {2}, DataRecipe(), Limit(10_000)).samples
    by_hand = case.by_hand(messages)
    assert masks.wrong_tokens(case.tokenizer, [sample], by_hand) == 0
    first = sample.trained.index(True)
    for changed in (first - 1, first, len(sample.trained) - 1):
        sample.trained[changed] = not sample.trained[changed]
        assert masks.wrong_tokens(case.tokenizer, [sample], by_hand) == 1
        sample.trained[changed] = not sample.trained[changed]
    sample.tokens[0] += 1
    assert masks.wrong_tokens(case.tokenizer, [sample], by_hand) > 1


CONTENT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\té🙂你\u0301\u200d1aB<|>#:[]/")),
    max_size=14,
)
ANSWER = CONTENT.filter(lambda text: bool(text.strip()))
TURNS = st.lists(st.tuples(CONTENT, ANSWER, st.booleans()), min_size=1, max_size=3)


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=40, deadline=None)
@given(system=st.none() | CONTENT, turns=TURNS)
def test_what_is_learned_reads_as_the_answers_and_their_ends(
    name: str, system: str | None, turns: list[tuple[str, str, bool]]
) -> None:
    case = OWN[name]
    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for question, answer, learned in turns:
        if case.thoughts == "all":
            answer = f"<think>\nhm\n</think>\n\n{answer.strip()}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if not learned:
            messages[-1]["weight"] = 0
    if not masks.answers(messages):
        return
    row = Row("chats.jsonl", 1, {})
    try:
        samples = render([(row, Chat(messages))], case.tokenizer, {2}, DataRecipe(), Limit(10_000)).samples
    except DataError as error:
        assert "changes this answer" in str(error)  # Unicode white space that a template trims
        return
    by_hand = case.by_hand(messages)
    assert masks.wrong_tokens(case.tokenizer, samples, by_hand) == 0
    said = "".join(
        case.tokenizer.decode([token for token, on in zip(each.tokens, each.trained, strict=True) if on])
        for each in samples
    )
    assert said == "".join(text for pieces in by_hand for text, learned in pieces if learned)

"""What a smaller copy lost: nothing for a copy, more with fewer bits; on any text, in windows."""

import json
from pathlib import Path

import pytest

from mlxtune import fidelity, model
from mlxtune.convert import convert
from mlxtune.errors import DataError
from mlxtune.recipe import QuantizeRecipe


@pytest.fixture(scope="module")
def lm(tiny: Path) -> model.LanguageModel:
    return model.load(tiny)


def test_a_copy_loses_nothing(lm: model.LanguageModel, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "copy")
    found = fidelity.compare(lm, tmp_path / "copy", fidelity.read_text(lm)[:8], "copy")
    assert found.divergence.kl_max == 0 and found.divergence.same_top == 1
    assert found.bits_per_weight == 32
    assert found.bytes == (tmp_path / "copy" / "model.safetensors").stat().st_size


def test_fewer_bits_lose_more(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "MOST_WINDOWS", 12)
    told: list[str] = []
    choices = [QuantizeRecipe(bits=bits) for bits in (2, 4, 8)]
    found = fidelity.sweep(tiny, choices, on_progress=lambda what, done, total: told.append(what))
    assert [each.name for each in found] == ["2 bits", "4 bits", "8 bits"]
    two, four, eight = (each.divergence.kl_mean for each in found)
    assert two > 3 * four > 9 * eight > 0
    assert [round(each.bits_per_weight, 1) for each in found] == [3.0, 5.0, 9.0]  # with a float32 scale and bias
    assert {"quantized", "read by 2 bits", "read by 8 bits"} <= set(told)
    assert found[0].to_dict()["divergence"]["tokens"] == found[0].divergence.tokens


def test_text_is_read_in_windows_that_lie_over_all_of_it(lm: model.LanguageModel, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(" ".join(f"word {number}," for number in range(12_000)))
    found = fidelity.read_text(lm, str(text))
    assert len(found) == fidelity.MOST_WINDOWS
    assert all(len(each.tokens) <= fidelity.WINDOW for each in found)
    assert found[0].tokens != found[-1].tokens
    last = lm.tokenizer.decode(found[-1].tokens)
    assert int("".join(filter(str.isdigit, last.split("word")[-2]))) > 11_000


def test_what_is_said_in_rows_of_any_kind(lm: model.LanguageModel, tmp_path: Path) -> None:
    rows = [
        {"text": "alone"},
        {"prompt": "asked", "completion": "answered"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]},
    ]
    for row, expected in zip(rows, ["alone", "asked\nanswered", "hello\nhi there"], strict=True):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n")
        (sample,) = fidelity.read_text(lm, str(file))
        assert expected in lm.tokenizer.decode(sample.tokens)


@pytest.mark.parametrize(("name", "text"), [("empty.txt", " \n"), ("missing.txt", None)])
def test_no_text_is_said(lm: model.LanguageModel, tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError):
        fidelity.read_text(lm, str(tmp_path / name))

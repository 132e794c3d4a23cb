"""`mlxtune generate`: whole output, the range of each flag, and what reaches a terminal."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxtune import generate, model
from mlxtune.cli import main
from mlxtune.cli.display import harmless
from mlxtune.cli.generate import shown
from mlxtune.generate import Piece

QUESTION = "Where is my card?"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mlxtune generate ...`; returns exit code, stdout and stderr."""

    def call(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as caught:
            main(["generate", *args])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call


def expected(path: Path, tokens: list[int] | None, max_tokens: int, text: str = "") -> str:
    lm = model.load(path)
    asked = tokens if tokens is not None else generate.text_tokens(lm, text)
    return "".join(piece.text for piece in generate.stream(lm, asked, max_tokens=max_tokens))


def chat_tokens(path: Path, *contents: str) -> list[int]:
    roles = ["system", "user"][-len(contents) :]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return generate.prompt_tokens(model.load(path), messages)


def test_only_the_answer_is_printed(run: Run, tiny: Path) -> None:
    answer = expected(tiny, chat_tokens(tiny, QUESTION), 20)
    assert run("--model", "tiny", "--prompt", QUESTION, "--max-tokens", "20") == (0, answer + "\n", "")


def test_the_prompt_from_stdin(run: Run, tiny: Path) -> None:
    answer = expected(tiny, chat_tokens(tiny, "Be kind.", "Grüße\nund so"), 12)
    args = ["--model", str(tiny), "--prompt", "-", "--max-tokens", "12", "--system-prompt", "Be kind."]
    assert run(*args, stdin="Grüße\nund so\n".encode()) == (0, answer + "\n", "")
    assert run(*args, stdin=b"caf\xe9") == (2, "", "error: stdin: is not UTF-8; save the text as UTF-8\n")


def test_plain_text_is_continued(run: Run, tiny: Path, stories: Path) -> None:
    args = ["--max-tokens", "12", "--prompt", "Once upon a time"]
    story = expected(stories, None, 12, "Once upon a time")
    assert run("--model", str(stories), *args) == (0, story + "\n", "")
    plain = expected(tiny, None, 12, "Once upon a time")
    assert run("--model", "tiny", "--ignore-chat-template", *args) == (0, plain + "\n", "")


def test_json(run: Run, tiny: Path) -> None:
    tokens = chat_tokens(tiny, QUESTION)
    code, out, err = run("--model", "tiny", "--prompt", QUESTION, "--max-tokens", "2", "--json")
    value = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert value.pop("tokens_per_second") > 0
    assert value == {
        "model": "tiny",
        "prompt": QUESTION,
        "answer": expected(tiny, tokens, 2),
        "prompt_tokens": len(tokens),
        "answer_tokens": 2,
        "finish_reason": "length",
    }


def test_a_seed_repeats_a_drawn_answer(run: Run) -> None:
    args = ["--model", "tiny", "--prompt", QUESTION, "--max-tokens", "12", "--temp", "2", "--top-p", "0.95"]
    first, again, other = run(*args), run(*args, "--seed", "0"), run(*args, "--seed", "1")
    assert first[0] == 0 and first == again and first != other


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temp", "-1"], "Invalid value for '--temp': -1.0 is not in the range x>=0."),
        (["--temp", "nan"], "Invalid value for '--temp': nan is not in the range x>=0."),
        (["--temp", "inf"], "Invalid value for '--temp': inf is not in the range x>=0."),
        (["--top-p", "0"], "Invalid value for '--top-p': 0.0 is not in the range 0<x<=1."),
        (["--top-p", "1.1"], "Invalid value for '--top-p': 1.1 is not in the range 0<x<=1."),
        (["--max-tokens", "0"], "Invalid value for '--max-tokens': 0 is not in the range x>=1."),
        (["--seed", "-1"], "Invalid value for '--seed': -1 is not in the range 0<=x<=9223372036854775807."),
    ],
)
def test_ranges(run: Run, args: list[str], said: str) -> None:
    line = f"error: {said} (`mlxtune generate --help`)\n"
    assert run("--model", "tiny", "--prompt", QUESTION, *args) == (2, "", line)


def test_what_cannot_be_answered(run: Run, tiny: Path, stories: Path, tmp_path: Path) -> None:
    long = "7 is a number. " * 500
    count = len(generate.text_tokens(model.load(tiny), long))
    lines = [
        (
            ["--model", str(stories), "--prompt", "Once", "--system-prompt", "Be kind."],
            f"{stories}: --system-prompt needs a chat template; put the text into --prompt",
        ),
        (
            ["--model", "tiny", "--ignore-chat-template", "--prompt", ""],
            "the prompt is empty; give at least one word",
        ),
        (
            ["--model", "tiny", "--ignore-chat-template", "--prompt", long],
            f"the model's context of 512 tokens is full: {count:,} are taken; shorten the prompt",
        ),
        (
            ["--model", "tiny", "--adapter-path", str(tmp_path), "--prompt", "Once"],
            f"{tmp_path}: has no adapter_config.json; give the folder that `mlxtune train` wrote",
        ),
    ]
    for args, said in lines:
        assert run(*args) == (2, "", f"error: {said}\n")


def test_an_adapter_changes_the_answer(run: Run, tiny: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    config = {
        "fine_tune_type": "lora",
        "num_layers": 3,
        "lora_parameters": {"rank": 2, "scale": 50.0, "dropout": 0.0, "keys": ["mlp.down_proj"]},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for block in range(3):
        name = f"model.layers.{block}.mlp.down_proj"
        tensors[f"{name}.lora_a"] = mx.random.normal((512, 2), key=mx.random.key(block))
        tensors[f"{name}.lora_b"] = mx.random.normal((2, 192), key=mx.random.key(9 + block))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    args = ["--model", "tiny", "--prompt", QUESTION, "--max-tokens", "12"]
    code, out, err = run(*args, "--adapter-path", str(tmp_path))
    assert (code, err) == (0, "") and out != run(*args)[1]


# what reaches a terminal


def test_control_characters_become_visible() -> None:
    text = "a\tb\nä€\x1b[31m\x00\r\x07\x7f\x9b1m\u202eabc\u2066"
    assert harmless(text) == "a\tb\nä€\\x1b[31m\\x00\\x0d\\x07\\x7f\\x9b1m\\u202eabc\\u2066"
    assert harmless("👩\u200d🚀 שלום ok") == "👩\u200d🚀 שלום ok"  # joiners and other scripts stay


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("screen", "seen"), [(Screen(), "\\x1b[2Jx"), (io.StringIO(), "\x1b[2Jx")])
def test_a_terminal_sees_no_escape_sequence_and_a_pipe_sees_all(
    screen: io.StringIO, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", screen)
    figures = {"prompt_tokens": 1, "prompt_tokens_per_second": 1.0, "tokens_per_second": 1.0, "peak_memory_gb": 0.1}
    pieces = [
        Piece(text=text, token=5, count=count, finish_reason=None, **figures)
        for count, text in enumerate(["\x1b", "[2J", "x"], start=1)
    ]
    assert list(shown(pieces)) == pieces
    assert screen.getvalue() == seen

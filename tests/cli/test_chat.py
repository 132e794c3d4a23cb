"""`mlxtune chat`: whole transcripts through a pipe, and keys, prompts and escapes at a real pseudo-terminal."""

import contextlib
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtune import generate, model
from mlxtune.cli import main
from mlxtune.tokenizer import load_tokenizer

Run = Callable[..., tuple[int, str, str]]
HELP = """\
  /help         show this
  /retry        answer the last message again
  /undo         take back the last message and its answer
  /clear        forget the conversation; the system prompt stays
  /system TEXT  set the system prompt; without TEXT, remove it
  /save FILE    write the conversation as a row of training data (.jsonl)
  /exit         leave, as Ctrl-D does
  \"""           opens and ends a message of many lines
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mlxtune chat ...` with lines from a pipe; returns exit code, stdout and stderr."""

    def call(*args: str, stdin: str | bytes = "") -> tuple[int, str, str]:
        given = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        with pytest.raises(SystemExit) as caught:
            main(["chat", *args])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call


class Script:
    """What the embedded model says, worked out without a conversation: each time the whole history is fed."""

    def __init__(self, path: Path, max_tokens: int):
        self.lm, self.max_tokens = model.load(path), max_tokens
        self.system: str | None = None
        self.turns: list[dict[str, str]] = []
        self.out = ""

    def say(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        self.answer()

    def retry(self) -> None:
        self.turns.pop()
        self.answer()

    def answer(self) -> None:
        tokens = generate.prompt_tokens(self.lm, self.messages)
        text = "".join(piece.text for piece in generate.stream(self.lm, tokens, max_tokens=self.max_tokens))
        self.turns.append({"role": "assistant", "content": text})
        self.out += text + "\n"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] * (self.system is not None) + self.turns


# through a pipe


def test_each_line_is_a_message_and_only_answers_are_printed(run: Run, tiny: Path) -> None:
    script = Script(tiny, 10)
    script.say("Where is my card?")
    script.say("And my refund, Ömer?")
    lines = "Where is my card?\n\n   \nAnd my refund, Ömer?"
    assert run("--model", "tiny", "--max-tokens", "10", stdin=lines) == (0, script.out, "")


def test_commands_through_a_pipe(run: Run, tiny: Path, tmp_path: Path) -> None:
    script = Script(tiny, 10)
    script.system = "Be kind."
    script.say("Where is my card?")
    script.say("line one\nline two")
    script.retry()
    script.turns = script.turns[:-2]  # /undo
    script.say("/etc is a folder")
    script.system = "You label tickets."
    script.say("And now?")
    saved = script.messages
    script.turns, script.system = [], None  # /clear and /system
    script.say("Thank you.")
    lines = [
        "Where is my card?",
        '"""line one',
        'line two"""',
        "/retry",
        "/undo",
        " /etc is a folder",
        "/system You label tickets.",
        "And now?",
        f"/save {tmp_path / 'my talk.jsonl'}",
        "/clear",
        "/system",
        '"""',
        "Thank you.",
        '"""',
        "/exit",
        "never said",
    ]
    args = ("--model", str(tiny), "--max-tokens", "10", "--system-prompt", "Be kind.")
    assert run(*args, stdin="\n".join(lines)) == (0, script.out, "")
    assert [each.name for each in tmp_path.iterdir()] == ["my talk.jsonl"]
    assert json.loads((tmp_path / "my talk.jsonl").read_text(encoding="utf-8")) == {"messages": saved}


def test_help_goes_beside_the_answers(run: Run) -> None:
    assert run("--model", "tiny", stdin="/help\n") == (0, "", HELP)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/hlep", "no command /hlep; did you mean /help?"),
        ("/usr/bin is full", "no command /usr/bin; /help lists the commands; a space before it makes it a message"),
        ("/retry it", "/retry takes nothing behind it; a space before it makes it a message"),
        ("/retry", "there is no answer to retry"),
        ("/undo", "there is nothing to undo"),
        ("/save", "/save needs a file; such as /save talk.jsonl"),
        ("/save talk.jsonl", "there is no answer to save yet"),
        ('"""no end', 'the message that """ opened has no end; end it with """'),
        (b"caf\xe9", "stdin: is not UTF-8; save the messages as UTF-8"),
    ],
)
def test_a_mistake_ends_a_pipe(run: Run, line: str | bytes, said: str) -> None:
    assert run("--model", "tiny", stdin=line) == (2, "", f"error: {said}\n")


def test_models_are_checked_before_they_are_loaded(run: Run, stories: Path, tmp_path: Path) -> None:
    hint = "continue a text with `mlxtune generate` instead"
    assert run("--model", str(stories)) == (2, "", f"error: {stories}: has no chat template; {hint}\n")
    shutil.copytree(stories, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = run("--model", str(tmp_path / "copy"))
    assert (code, out) == (2, "") and "is no whole safetensors file" in err


def test_an_adapter_may_bring_its_chat_template(run: Run, stories: Path, tmp_path: Path) -> None:
    config = {
        "fine_tune_type": "lora",
        "num_layers": 5,
        "lora_parameters": {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }
    tensors = {}
    for block in range(5):
        tensors[f"model.layers.{block}.self_attn.q_proj.lora_a"] = mx.zeros((64, 1))
        tensors[f"model.layers.{block}.self_attn.q_proj.lora_b"] = mx.zeros((1, 64))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lm = model.load(stories)  # the adapter adds nothing but the template
    tokens = lm.tokenizer.encode("Once upon a time ", add_special_tokens=False)
    answer = "".join(piece.text for piece in generate.stream(lm, tokens, max_tokens=8))
    args = ("--model", str(stories), "--adapter-path", str(tmp_path), "--max-tokens", "8")
    assert run(*args, stdin="Once upon a time\n") == (0, answer + "\n", "")


# at a terminal


def scripted(tiny: Path, folder: Path, start: str, *answer: str) -> Path:
    """A model that says `answer`, token by token, whenever the text so far ends with the token `start`.

    One block that adds nothing, each token of the chain on an axis of its own, and an output layer that maps each
    axis to the token that comes next in the chain.
    """
    tokenizer = load_tokenizer(tiny, {})
    chain = tokenizer.convert_tokens_to_ids([start, *answer])
    assert None not in chain
    vocabulary, width = len(tokenizer), 64
    embeddings, output = mx.zeros((vocabulary, width)), mx.zeros((vocabulary, width))
    for axis, (now, following) in enumerate(zip(chain, chain[1:], strict=False)):
        embeddings[now, axis] = 1.0
        output[following, axis] = 1.0
    weights = {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": output,
        "model.norm.weight": mx.ones(width),
        "model.layers.0.input_layernorm.weight": mx.ones(width),
        "model.layers.0.post_attention_layernorm.weight": mx.ones(width),
    }
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        weights[f"model.layers.0.{layer}.weight"] = mx.zeros((width, width))
    for layer in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{layer}.weight"] = mx.zeros((width, width))
    config = json.loads((tiny / "config.json").read_text()) | {
        "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": width, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "max_position_embeddings": 100_000,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    return folder


class Terminal:
    """A pseudo-terminal with a program in it, its controlling terminal, so that keys such as Ctrl-C work."""

    LAUNCH = "import os; os.open(os.ttyname(0), os.O_RDWR); from mlxtune.cli import main; main()"

    def __init__(self, folder: Path, *args: str):
        self.master, slave = os.openpty()
        self.program = subprocess.Popen(
            [sys.executable, "-c", self.LAUNCH, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=folder,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(slave)
        self.seen = ""

    def read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
        except OSError:  # Linux: the program has closed its end
            return False
        return True

    def until(self, pattern: str, seconds: float = 20) -> str:
        """Waits for a regular expression in what comes; returns the text up to its end and forgets it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            if not self.read(0.2) and (time.monotonic() > end or self.program.poll() is not None):
                raise AssertionError(f"{pattern!r} did not come, but {self.seen!r}")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C at a prompt, again until it is seen: readline notices a signal only once it waits for a key."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.until(r"\(Ctrl-D or /exit leaves\)\r\n> $", 1)
                return
        raise AssertionError(f"no hint came, but {self.seen!r}")

    def leave(self) -> int:
        """Waits for the program's end; returns its exit code."""
        while self.read(0.2) or self.program.poll() is None:
            pass
        return self.program.wait(10)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> Terminal:
            opened = Terminal(tmp_path, *args)
            stack.callback(os.close, opened.master)
            stack.callback(opened.program.wait)
            stack.callback(opened.program.kill)
            return opened

        yield start


def test_keys_at_a_terminal(terminal: Callable[..., Terminal], tiny: Path, tmp_path: Path) -> None:
    endless = scripted(tiny, tmp_path / "endless", "Ċ", "a", "b", "a")  # after a newline: abababab...
    screen = terminal("chat", "--model", str(endless), "--max-tokens", "90000")
    greeting = screen.until("> $")
    assert greeting == f"Chatting with {endless}. /help shows the commands, Ctrl-D leaves.\r\n> "
    screen.type("go\n")
    screen.until("abababab")
    screen.type("\x03")  # Ctrl-C stops the answer, not the program
    stopped = screen.until(r"\r\n\r\n> $")
    assert re.match(r"[ab]*(\^C)?[ab]*\r\n.*  \d+ tokens, \d+ tokens/s, \d\.\d\d GB, stopped", stopped)
    screen.type("/retry\n")
    screen.until("abababab")
    screen.type("\x03")
    screen.until(r"stopped.*\r\n\r\n> $")
    screen.type("/hlep\n")
    screen.until(r"no command /hlep; did you mean /help\?.*\r\n> $")
    screen.type("/save talk.jsonl\n")
    screen.until(r"1 answer saved to talk\.jsonl.*\r\n> $")
    screen.interrupt_prompt()
    screen.type('"""half a mess')
    screen.type("age\n")
    screen.until(r"\.\.\. $")
    screen.interrupt_prompt()  # abandons the message
    screen.type("\x04")
    assert screen.leave() == 0
    messages = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "go"}
    assert re.fullmatch("(ab)+a?", messages[1]["content"])
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_escape_sequences_of_a_model_are_shown_not_obeyed(
    terminal: Callable[..., Terminal], run: Run, tiny: Path, tmp_path: Path
) -> None:
    escape = "ě"  # how a byte-level tokenizer writes byte 27
    hostile = scripted(tiny, tmp_path / "hostile", "Ċ", escape, "]", "0", ";", "x", "<|im_end|>")
    assert run("--model", str(hostile), stdin="go\n") == (0, "\x1b]0;x\n", "")  # a pipe gets what was said
    screen = terminal("chat", "--model", str(hostile))
    screen.until("> $")
    screen.type("go\n")
    shown = screen.until(r"tokens/s.*\r\n\r\n> $")
    assert "\\x1b]0;x\r\n" in shown and "\x1b]" not in shown
    screen.type("/exit\n")
    assert screen.leave() == 0

"""`mlxtune chat`: a conversation in the terminal or through a pipe. Knows lines, commands and keys, not models.

Answers go to stdout, all else to stderr. At a terminal there are prompts, remarks and Ctrl-C; from a pipe each line
is a message, and the first mistake ends the command.
"""

import contextlib
import difflib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from mlxtune.cli import display
from mlxtune.cli.fetch import fetch
from mlxtune.cli.generate import answer_flags, load, remark, shown, speed
from mlxtune.errors import InputError, MlxtuneError

if TYPE_CHECKING:
    from mlxtune.chat import Conversation
    from mlxtune.generate import Piece

COMMANDS = {
    "/help": ("", "show this"),
    "/retry": ("", "answer the last message again"),
    "/undo": ("", "take back the last message and its answer"),
    "/clear": ("", "forget the conversation; the system prompt stays"),
    "/system": ("TEXT", "set the system prompt; without TEXT, remove it"),
    "/save": ("FILE", "write the conversation as a row of training data (.jsonl)"),
    "/exit": ("", "leave, as Ctrl-D does"),
}
QUOTES = '"""'


@click.command("chat", short_help="chat with a model in the terminal")
@answer_flags
def command(
    name: str,
    revision: str | None,
    adapter_path: Path | None,
    system_prompt: str | None,
    max_tokens: int,
    temp: float,
    top_p: float,
    seed: int,
) -> None:
    """Chat with a model: Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.

    From a pipe, each line is a message, and only the answers are printed.

    \b
    Examples:
      mlxtune chat --model tiny --temp 0.7
      echo "My card has not arrived." | mlxtune chat --model tiny
    """
    from mlxtune import adapter, chat

    path = fetch(name, revision)
    if adapter_path is None or adapter.check(adapter_path).get("chat_template") is None:
        chat.check(path)  # else the adapter brings the template that it was trained with
    lm = load(path, adapter_path)
    talk = chat.Conversation(lm, system=system_prompt, max_tokens=max_tokens, temp=temp, top_p=top_p, seed=seed)
    if not sys.stdin.isatty():
        while (line := _next_message(_piped_line)) and _respond(talk, *line):
            pass
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() editing and a history
    display.note(f"Chatting with {display.harmless(name)}. /help shows the commands, Ctrl-D leaves.")
    while _turn(talk):
        pass


def _turn(talk: "Conversation") -> bool:
    """One turn at a terminal; False when it was the last. Mistakes and Ctrl-C cost no more than the turn."""
    try:
        line = _next_message(_typed_line)
        if line is None:
            display.note("")
            return False
        return _respond(talk, *line)
    except KeyboardInterrupt:
        display.note("\n(Ctrl-D or /exit leaves)")
    except MlxtuneError as error:
        display.note(click.style("error: ", fg="red", bold=True) + display.harmless(str(error)))
    return True


def _next_message(read: Callable[[str], str | None]) -> tuple[str, bool] | None:
    '''The next message and whether it may be a command; None at the end. """ opens and ends one of many lines.'''
    line = read("> ")
    if line is None:
        return None
    if not line.startswith(QUOTES):
        return line, True
    text = line.removeprefix(QUOTES)
    while not text.rstrip().endswith(QUOTES):
        line = read("... ")
        if line is None:
            raise InputError(f"the message that {QUOTES} opened has no end", hint=f"end it with {QUOTES}")
        text += "\n" + line
    return text.rstrip().removesuffix(QUOTES).strip("\n"), False


def _typed_line(prompt: str) -> str | None:
    try:
        if sys.stdout.isatty():
            return input(prompt)
        click.echo(prompt, nl=False, err=True)  # input() would write it into the answers
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise InputError("that is not UTF-8", hint="type it again") from None
    return _piped_line(prompt)


def _piped_line(_prompt: str) -> str | None:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError:
        raise InputError("is not UTF-8", where="stdin", hint="save the messages as UTF-8") from None
    return line.removesuffix("\n") if line else None


def _respond(talk: "Conversation", text: str, may_be_command: bool) -> bool:
    """Answers a message or obeys a command; False if it was the command to leave."""
    if may_be_command and text.startswith("/"):
        name, _, argument = text.partition(" ")
        if name == "/exit":
            return False
        pieces = _obey(talk, name, argument.strip())
    else:
        pieces = talk.say(text.strip()) if text.strip() else None
    if pieces is not None:
        _answer(talk, pieces)
    return True


def _obey(talk: "Conversation", name: str, argument: str) -> "Generator[Piece] | None":
    """Does what a command says and returns the answer that it asks for, if it does."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "/help lists the commands; a space before it makes it a message"
        raise InputError(f"no command {name}", hint=hint)
    if argument and not COMMANDS[name][0]:
        raise InputError(f"{name} takes nothing behind it", hint="a space before it makes it a message")
    match name:
        case "/help":
            for known, (wanted, what) in COMMANDS.items():
                display.note(f"  {f'{known} {wanted}':<14}{what}")
            display.note(f"  {QUOTES:<14}opens and ends a message of many lines")
        case "/retry":
            pieces = talk.retry()
            if talk.temp == 0:
                _tell("the answer to expect is the same: --temp 0 always takes the likeliest token")
            return pieces
        case "/undo":
            _tell(f"took back: {' '.join(talk.undo().split())[:60]}")
        case "/clear":
            talk.clear()
            _tell("the conversation is forgotten")
        case "/system":
            talk.set_system(argument)
            _tell("the system prompt is set" if argument else "there is no system prompt now")
        case "/save":
            if not argument:
                raise InputError("/save needs a file", hint="such as /save talk.jsonl")
            answers = talk.save(Path(argument).expanduser())
            left_out = len(talk.turns) // 2 - answers
            empty = f"; {left_out} without an answer left out" if left_out else ""
            _tell(f"{display.count(answers, 'answer')} saved to {argument}{empty}")
    return None


def _answer(talk: "Conversation", pieces: "Generator[Piece]") -> None:
    """Shows an answer as it comes. At a terminal, the first Ctrl-C stops it after its token and the second at once."""
    last: Piece | None = None
    stopped = False
    with contextlib.closing(pieces), _ctrl_c() as pressed:
        try:
            for piece in shown(pieces):
                last = piece
                if pressed:
                    stopped = True
                    break
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            stopped = True
    click.echo()
    remarks = [speed(last)] if last else []
    if stopped:
        remarks.append("stopped")
    elif last and last.finish_reason == "length":
        full = last.count < talk.max_tokens
        remarks.append("cut: the context is full" if full else f"cut at --max-tokens {talk.max_tokens}")
    _tell(", ".join(remarks))
    if sys.stdin.isatty():
        display.note("")


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that is filled by Ctrl-C at a terminal; pressed again, it raises KeyboardInterrupt as usual."""
    pressed: list[int] = []

    def press(number: int, _frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if not sys.stdin.isatty():  # no one is there to go on with the conversation
        yield pressed
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(text: str) -> None:
    """A remark in a conversation at a terminal; through a pipe there are only answers."""
    if sys.stdin.isatty():
        remark(display.harmless(text))

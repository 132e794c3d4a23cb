"""Help: every command has it, with examples whose flags exist, and it answers without MLX."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from mlxtune import __version__
from mlxtune.cli import ALIASES, COMMANDS, LazyGroup, group

Invoke = Callable[..., tuple[int, str, str]]


def commands() -> Iterator[tuple[list[str], click.Command]]:
    """Every command and command of a command, with the words that call it."""
    assert isinstance(group, LazyGroup)
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        yield [name], command
        if isinstance(command, click.Group):
            for inner in command.commands:
                yield [name, inner], command.commands[inner]


ALL = list(commands())


def test_commands_in_their_order(invoke: Invoke) -> None:
    code, out, err = invoke("--help")
    assert (code, err) == (0, "")
    listed = re.findall(r"^  (\w+)  ", out.split("Commands:\n")[1], re.MULTILINE)
    assert listed == [
        "run", "convert", "quantize", "dequantize", "estimate", "train", "evaluate", "fuse", "compare", "generate",
        "chat", "data", "report", "verify", "doctor",
    ]  # fmt: skip
    assert invoke("-h") == (0, out, "")
    assert invoke("--version") == (0, f"mlxtune {__version__}\n", "")


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_each_has_help_with_an_example_that_parses(invoke: Invoke, words: list[str], command: click.Command) -> None:
    code, out, err = invoke(*words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: mlxtune {' '.join(words)} ")
    assert invoke(*words, "-h") == (0, out, "")
    examples = [line.strip() for line in (command.help or "").splitlines() if re.match(r"\s+(.* \| )?mlxtune ", line)]
    assert examples, "no example"
    for line in examples:
        assert line in re.sub(r"\s*\n\s+", " ", out) or line in out, "an example is broken over lines"
        args = shlex.split(line.split(" | ")[-1])
        assert args[: len(words) + 1] == ["mlxtune", *words] or isinstance(command, click.Group)
        if not isinstance(command, click.Group):
            command.make_context(words[-1], args[len(words) + 1 :])  # raises for a flag that is not there


def test_examples_name_files_that_ship() -> None:
    root = Path(__file__).parent.parent.parent
    named = {name for _, command in ALL for name in re.findall(r"configs/\S+", command.help or "")}
    assert named and all((root / name).is_file() for name in named)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(invoke: Invoke, alias: str, name: str) -> None:
    assert invoke(alias, "--help")[1].replace(f"mlxtune {alias} ", f"mlxtune {name} ", 1) == invoke(name, "--help")[1]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["trian"], "no command `trian`; did you mean `train`? (`mlxtune --help`)"),
        (["xyz"], "no command `xyz` (`mlxtune --help`)"),
        (["--nope"], "No such option '--nope'. (`mlxtune --help`)"),
        (["run"], "Missing argument 'RECIPE'. (`mlxtune run --help`)"),
        (["fuse", "--model", "tiny"], "Missing option '--adapter-path'. (`mlxtune fuse --help`)"),
        (["train", "extra"], "Got unexpected extra argument (extra) (`mlxtune train --help`)"),
    ],
)
def test_wrong_usage(invoke: Invoke, args: list[str], line: str) -> None:
    assert invoke(*args) == (2, "", f"error: {line}\n")


def test_without_a_command_help_is_shown(invoke: Invoke) -> None:
    code, out, err = invoke()
    assert code == 2
    assert "Usage: mlxtune" in out + err and "error" not in out + err


def test_help_of_all_commands_loads_no_mlx() -> None:
    code = (
        "import sys\n"
        "from mlxtune import cli\n"
        "for name in cli.COMMANDS:\n"
        "    try:\n"
        "        cli.main([name, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, name\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'huggingface_hub', 'safetensors', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")

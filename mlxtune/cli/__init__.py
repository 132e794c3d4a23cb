"""The command line: the only place with click, the only printing, and the one boundary where errors become lines.

Imports no mlx and no transformers; each command's module is loaded when it is called.
"""

import errno
import importlib
import os
import signal
import sys
from typing import Any

import click

from mlxtune import __version__
from mlxtune.errors import MlxtuneError

# command: (module in this package, what it does)
COMMANDS = {
    "run": ("run", "Recipe to verified model: audit, split, train, evaluate, fuse, compare, report."),
    "convert": ("convert", "Hugging Face model to an MLX folder, quantized with -q."),
    "quantize": ("quantize", "Quantize a model."),
    "dequantize": ("dequantize", "Give a quantized model dense weights again."),
    "estimate": ("estimate", "The memory that a training takes, whether it fits here, and what does."),
    "train": ("train", "Fine-tune a model with LoRA."),
    "evaluate": ("evaluate", "Score a model on every row of a file."),
    "fuse": ("fuse", "Fuse an adapter into its base, and check what was kept."),
    "compare": ("compare", "Tell whether tuning was worth it, against prompts, examples and retrieval."),
    "generate": ("generate", "Answer one prompt."),
    "chat": ("chat", "Chat with a model in the terminal."),
    "data": ("data", "Check data before training."),
    "report": ("report", "Rebuild the report of a run folder, or compare two runs."),
    "verify": ("verify", "Compute a report's figures again, and name what differs."),
    "doctor": ("doctor", "What this machine has, and what would make it faster."),
}
ALIASES = {"lora": "train", "merge": "fuse"}  # the names that mlx-lm's users know


class LazyGroup(click.Group):
    """Loads a command's module only when it is called, so that help is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mlxtune.cli.{COMMANDS[name][0]}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and name not in ALIASES:
            import difflib

            near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise click.UsageError(f"no command `{name}`{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mlxtune", message="%(prog)s %(version)s")
def group() -> None:
    """From a file of examples to a small, verified model that runs on your own laptop.

    \b
    Start here:
      mlxtune run configs/quickstart.yaml     the whole path on an embedded model
      mlxtune data check tickets.jsonl        what is wrong with your examples
      mlxtune COMMAND --help                  each with an example
    """


def main(args: list[str] | None = None) -> None:
    """Runs a command line and exits with its code: 0, 1, 2, 3, 4, or 128 + the signal that ended it."""
    from mlxtune import machine

    machine.prepare()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = group.main(args=args, prog_name="mlxtune", standalone_mode=False, color=colour())
        if sys.stdout is not None:  # closed by the caller, as in `>&-`
            sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True, color=colour())
        sys.exit(2)
    except click.ClickException as error:
        usage = f" (`{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        fail(f"{error.format_message()}{usage}", 2)
    except MlxtuneError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        fail("no space left on the disk; free some space and run again", 3)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", 130)
    except Terminated:
        fail("terminated", 143)


class Terminated(BaseException):
    """SIGTERM arrived outside work that handles it itself."""


def _interrupt(_signal: int, _frame: Any) -> None:
    raise Terminated


def _drop_output() -> None:
    """Sends what is left of the output nowhere, so that Python does not fail on it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(line: str, code: int) -> None:
    """Prints the one line of an error and exits; characters that a terminal would obey are spelt out.

    Of several workers, each names itself, and an interruption is told by the first alone.
    """
    from mlxtune import machine
    from mlxtune.cli import display

    rank = machine.worker_rank(os.environ)
    if rank and code > 128:
        sys.exit(code)
    shown = (f"worker {rank}: " if rank else "") + display.harmless(" ".join(line.split()))
    click.echo(click.style("error: ", fg="red", bold=True) + shown, err=True, color=colour())
    sys.exit(code)


def colour() -> bool | None:
    """False where NO_COLOR is set; None: colour on terminals only."""
    return False if os.environ.get("NO_COLOR") else None

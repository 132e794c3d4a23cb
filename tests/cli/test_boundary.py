"""The boundary of the command line: every way to end is a code, and at most one line."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlxtune import __version__, cli

# a command of this test's own, called as any other
PROBE = """
import os, signal, sys, time, types
import click
from mlxtune import cli, errors

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background

@click.command("probe")
def command():
    {body}

sys.modules["mlxtune.cli.probe"] = types.ModuleType("mlxtune.cli.probe")
sys.modules["mlxtune.cli.probe"].command = command
cli.COMMANDS["probe"] = ("probe", "A probe.")
cli.main(["probe"])
"""
WAIT = "click.echo('ready'); time.sleep(60)"


def probe(body: str, **settings: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command whose body is one line of Python."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(body=body)], capture_output=True, text=True, timeout=60, **settings
    )  # type: ignore[call-overload]
    return done.returncode, done.stdout, done.stderr


def mlxtune(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "mlxtune", *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_version_by_module() -> None:
    assert mlxtune("--version") == (0, f"mlxtune {__version__}\n", "")


def test_version_by_script() -> None:
    script = Path(sys.executable).with_name("mlxtune")
    if not script.exists():
        pytest.skip("needs mlxtune installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mlxtune {__version__}\n", "")


def test_help_lists_every_command() -> None:
    code, out, err = mlxtune("--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines() if line[2:3].strip()]
    assert listed == list(cli.COMMANDS)
    assert mlxtune("-h") == (0, out, "")


def test_no_command_shows_the_help_without_an_error() -> None:
    code, out, err = mlxtune()
    assert (code, out) == (2, "")
    assert err == mlxtune("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "no command `trian`; did you mean `train`? (`mlxtune --help`)"),
        (["lorra"], "no command `lorra`; did you mean `lora`? (`mlxtune --help`)"),
        (["zzz"], "no command `zzz` (`mlxtune --help`)"),
        (["zzz", "--help"], "no command `zzz` (`mlxtune --help`)"),
        (["--zzz"], "No such option '--zzz'. (`mlxtune --help`)"),
        (["doctor", "--jsn"], "No such option '--jsn'. Did you mean '--json'? (`mlxtune doctor --help`)"),
        (["doctor", "me"], "Got unexpected extra argument (me) (`mlxtune doctor --help`)"),
    ],
)
def test_usage_errors(arguments: list[str], line: str) -> None:
    assert mlxtune(*arguments) == (2, "", f"error: {line}\n")


def test_aliases_are_the_same_command() -> None:
    code, out, err = mlxtune("lora", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: mlxtune lora ")
    assert out.partition("\n\n")[2] == mlxtune("train", "--help")[1].partition("\n\n")[2]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("errors.DataError('is empty', where='a.jsonl:17', hint='fill it in')", 2, "a.jsonl:17: is empty; fill it in"),
        ("errors.TrainingError('the loss is NaN')", 1, "the loss is NaN"),
        ("errors.HubError('cannot be reached')", 3, "cannot be reached"),
        ("errors.TrustError('asks to run its own code')", 4, "asks to run its own code"),
        ("errors.Interrupted('stopped at step 40', signal_number=signal.SIGINT)", 130, "stopped at step 40"),
        ("errors.Interrupted('stopped at step 40', signal_number=signal.SIGTERM)", 143, "stopped at step 40"),
        ("errors.DataError('holds \\x1b[31m\\u202e\\udcff')", 2, "holds \\x1b[31m\\u202e\\udcff"),
        ("click.UsageError('two\\n\\tlines')", 2, "two lines (`mlxtune probe --help`)"),
        ("click.FileError('a', hint='gone')", 2, "Could not open file 'a': gone"),
        ("OSError(28, 'No space left on device')", 3, "no space left on the disk; free some space and run again"),
    ],
)
def test_a_deliberate_error_is_one_line(error: str, code: int, line: str) -> None:
    assert probe(f"raise {error}") == (code, "", f"error: {line}\n")


@pytest.mark.parametrize("error", ["ValueError('a bug')", "OSError('a bug')"])
def test_a_bug_keeps_its_traceback(error: str) -> None:
    code, out, err = probe(f"raise {error}")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith(f"{error.partition('(')[0]}: a bug\n")


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("return 3", 3), ("return 'text'", 0), ("sys.exit(4)", 4)])
def test_exit_codes_of_commands(body: str, code: int) -> None:
    assert probe(body) == (code, "", "")


@pytest.mark.parametrize(
    ("number", "code", "err"),
    # the empty line ends the one on which the terminal shows ^C
    [(signal.SIGINT, 130, "\nerror: interrupted\n"), (signal.SIGTERM, 143, "error: terminated\n")],
)
def test_signals(number: int, code: int, err: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROBE.format(body=WAIT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # into the wait: an interrupt inside a callback of the interpreter would be lost
        process.send_signal(number)
        out, shown = process.communicate(timeout=60)
    assert (process.returncode, out, shown) == (code, "", err)


@pytest.mark.parametrize("write", ["click.echo('x' * 100)", "print('x' * 100)"])
def test_a_reader_that_leaves_is_no_error(write: str) -> None:
    body = f"[{write} for _ in range(10_000)]"
    with subprocess.Popen(
        [sys.executable, "-c", PROBE.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "x" * 100 + "\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(timeout=60)
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", ["click.echo('x')", "print('x')"])
def test_a_full_disk_under_the_output(write: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROBE.format(body=write)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 3
    assert done.stderr == "error: no space left on the disk; free some space and run again\n"


def test_no_output_at_all() -> None:
    command = f'exec "{sys.executable}" -m mlxtune --version >&-'
    done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("no_color", "shown"),
    [("", b"\x1b[31m\x1b[1merror: \x1b[0mfailed\r\n"), ("1", b"error: failed\r\n")],
)
def test_colour_is_for_terminals_that_want_it(no_color: str, shown: bytes) -> None:
    master, terminal = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", PROBE.format(body="raise errors.MlxtuneError('failed')")],
            env={**os.environ, "NO_COLOR": no_color},
            stderr=terminal,
            timeout=60,
        )
        assert os.read(master, 1000) == shown
    finally:
        os.close(master)
        os.close(terminal)


def test_no_color_reaches_warnings_of_commands() -> None:
    body = "from mlxtune.cli import display; display.warn('careful')"
    master, terminal = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", PROBE.format(body=body)],
            env={**os.environ, "NO_COLOR": "1"},
            stderr=terminal,
            timeout=60,
        )
        assert os.read(master, 1000) == b"warning: careful\r\n"
    finally:
        os.close(master)
        os.close(terminal)

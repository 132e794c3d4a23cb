"""The shape of the package: who imports whom, what starts without MLX, and what every file and command has."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mlxtune
from mlxtune import cli

PACKAGE = Path(mlxtune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each line imports only from the lines above it; neighbours on a line do not import each other.
LINES = [
    {"errors"},
    {"rundir", "machine", "headers"},
    {"recipe", "hub", "report", "borrow"},
    {
        "tokenizer",
        "architecture",
        "fp8",
        "precision",
        "lora",
        "head",
        "crossentropy",
        "progress",
        "workers",
        "attention",
        "vectors",
    },
    {"claims"},
    {"folder"},
    {"shards"},
    {"model", "data", "caches"},
    {"packing", "prefix", "beginnings"},
    {
        "adapter",
        "checkpoint",
        "generate",
        "origin",
        "likelihood",
        "optimizer",
        "recompute",
        "noise",
        "steplog",
        "sources",
    },
    {"gradient", "layout", "memory"},
    {"fitting"},
    {"quant", "metrics", "export", "trackers"},
    {"layers", "evaluation"},
    {"packs"},
    {"convert", "train", "estimate", "evaluate", "chat"},
    {"fidelity", "allotment"},
    {"fusing"},
    {"fuse"},
    {"comparison"},
    {"compare"},
    {"stages"},
    {"pipeline", "verification"},
    {"verify"},
    {"cli"},
    {"__main__"},
]
LINE_OF = {name: number for number, line in enumerate(LINES) for name in line}
# library: the modules and packages that may import it
BORROWERS = {
    "click": {"cli"},
    "yaml": {"recipe"},
    "mlx_lm": {"borrow"},
}
HEAVY = (
    "mlx", "mlx_lm", "transformers", "huggingface_hub", "numpy", "tokenizers", "safetensors", "matplotlib", "bm25s",
    "sacrebleu", "jsonschema",
)  # fmt: skip
LONGEST = 400
VAGUE = {"utils", "util", "common", "helpers", "misc", "base", "core"}


def room(path: Path) -> str:
    """The module or package right below mlxtune that a file belongs to: `train`, `data`, or `` for mlxtune itself."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Each imported module's full name with its line; `package` is the file's own, for relative imports.

    Imports inside functions count as well: a layer is what a module needs, not when it needs it.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "mlxtune":
                for alias in node.names:
                    yield node.lineno, f"mlxtune.{alias.name}"
            else:
                yield node.lineno, module


def violations(source: str, importer: str, package: str = "mlxtune") -> list[str]:
    """What a file of the room `importer` may not import."""
    found = []
    for line, name in imports(source, package):
        top, _, rest = name.partition(".")
        if importer not in BORROWERS.get(top, {importer}):
            found.append(f"{line}: {top} belongs to {', '.join(sorted(BORROWERS[top]))}")
        imported = rest.split(".")[0]
        if top != "mlxtune" or imported in ("", "__version__", importer):
            continue
        if imported not in LINE_OF:
            found.append(f"{line}: {imported} has no line in LINES")
        elif LINE_OF[imported] >= LINE_OF.get(importer, -1):
            found.append(f"{line}: {importer or 'mlxtune'} lies below {imported} or beside it")
    return found


@pytest.mark.parametrize(
    ("importer", "source", "found"),
    [
        ("train", "from mlxtune import model, rundir\nfrom mlxtune.data.files import Row\nimport mlx.core", []),
        ("hub", "from mlxtune.rundir import storage_error\nfrom mlxtune import machine", []),
        ("cli", "import click\nfrom mlxtune import __version__", []),
        ("data", "from mlxtune.data.files import Row", []),
        ("borrow", "import mlx_lm.utils", []),
        ("data", "def late():\n    from mlxtune import model", ["2: data lies below model or beside it"]),
        ("rundir", "from mlxtune.recipe import Recipe", ["1: rundir lies below recipe or beside it"]),
        ("train", "import mlxtune.fuse", ["1: train lies below fuse or beside it"]),
        ("train", "from mlxtune.cli.display import note", ["1: train lies below cli or beside it"]),
        ("train", "from .fuse import fuse", ["1: train lies below fuse or beside it"]),
        ("train", "from . import fuse", ["1: train lies below fuse or beside it"]),
        ("", "from mlxtune.errors import MlxtuneError", ["1: mlxtune lies below errors or beside it"]),
        ("train", "from mlxtune import shiny", ["1: shiny has no line in LINES"]),
        ("chat", "from mlx_lm.generate import x", ["1: mlx_lm belongs to borrow"]),
        ("pipeline", "import yaml", ["1: yaml belongs to recipe"]),
        ("report", "from click import echo", ["1: click belongs to cli"]),
    ],
)
def test_the_rule_itself(importer: str, source: str, found: list[str]) -> None:
    assert violations(source, importer) == found


def test_relative_imports_are_resolved() -> None:
    assert list(imports("from . import b\nfrom .c import d\nfrom ..errors import E", "mlxtune.data")) == [
        (1, "mlxtune.data"),
        (2, "mlxtune.data.c"),
        (3, "mlxtune.errors"),
    ]


def test_every_import_goes_up() -> None:
    found = []
    for path in FILES:
        package = ".".join(("mlxtune", *path.relative_to(PACKAGE).parts[:-1]))
        lines = violations(path.read_text(encoding="utf-8"), room(path), package)
        found += [f"{path.relative_to(PACKAGE)}:{line}" for line in lines]
    assert found == []


def test_every_module_has_a_line() -> None:
    assert {room(path) for path in FILES} - {""} - LINE_OF.keys() == set()


def test_only_the_command_line_prints() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in FILES
        if room(path) != "cli"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert found == []


def test_every_file_says_what_it_does() -> None:
    silent = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_file_has_a_vague_name() -> None:
    assert [str(path.relative_to(PACKAGE)) for path in FILES if path.stem in VAGUE or path.parent.name in VAGUE] == []


def test_the_command_line_starts_without_mlx() -> None:
    files = sorted((PACKAGE / "cli").rglob("[!_]*.py"))
    modules = [
        "mlxtune.cli",
        *(".".join(("mlxtune", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in files),
    ]
    script = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    print(name, *sorted(set({HEAVY}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr) == (modules, "")


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, each with its full name."""
    yield name, command
    if isinstance(command, click.Group):
        for inner, each in command.commands.items():
            yield from commands(f"{name} {inner}", each)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_an_example(name: str) -> None:
    module, summary = cli.COMMANDS[name]
    found = importlib.import_module(f"mlxtune.cli.{module}").command
    assert isinstance(found, click.Command)
    assert found.name == name
    assert summary.endswith(".")
    for full_name, command in commands(f"mlxtune {name}", found):
        # click keeps a command's help option, so its names must be those of the real command line
        with click.Context(command, info_name=full_name, help_option_names=["-h", "--help"]) as context:
            usage, _, text = command.get_help(context).partition("\n")
        assert usage.startswith(f"Usage: {full_name}")
        assert re.search(rf"^ +{full_name}( |$)", text, re.MULTILINE), f"{full_name} has no example"


@pytest.mark.parametrize(("alias", "name"), cli.ALIASES.items())
def test_every_alias_is_a_command(alias: str, name: str) -> None:
    assert name in cli.COMMANDS
    assert alias not in cli.COMMANDS

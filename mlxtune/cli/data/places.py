"""How the data commands name files and show what stands in them. Knows no rows."""

from pathlib import Path

from mlxtune.cli import display


def hidden_folder(files: dict[str, Path]) -> str:
    """The folder that every place of a report would begin with, if it says nothing new; empty where there is none.

    The embedded set lies deep in the package, and a folder of splits has been named by the user.
    """
    from mlxtune.data.files import EMBEDDED

    (folder,) = {file.parent for file in files.values()}
    says_nothing = "all" not in files or files["all"] == EMBEDDED
    return f"{folder}/" if says_nothing and folder != Path() else ""


def on_one_line(text: str) -> str:
    """What stands in a file, harmless to the terminal and without line breaks that could pass for the report's."""
    return display.harmless(text).replace("\n", "\\n")

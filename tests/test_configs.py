"""Every YAML that ships is a recipe, and the reference shows all there is."""

from pathlib import Path

import pytest

from mlxtune import recipe

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_some() -> None:
    assert {"banking4.yaml", "quickstart.yaml", "reference.yaml"} <= {file.name for file in FILES}
    assert [file.name for file in CONFIGS.iterdir() if file.suffix != ".yaml"] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_builds_and_begins_with_what_it_is_for(file: Path) -> None:
    made = recipe.load(file)
    assert made.data.path is not None or file.name == "reference.yaml"
    assert file.read_text().startswith("# ")


def test_the_reference_is_complete() -> None:
    """If this fails: print(recipe.reference(), end="") into the file."""
    assert (CONFIGS / "reference.yaml").read_text() == recipe.reference()

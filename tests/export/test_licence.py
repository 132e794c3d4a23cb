from pathlib import Path

import pytest

from mlxtune.export.licence import Licence, front_matter, licence_of

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("README.md", "---\nlicense: mit\nlanguage: en\n---\n", Licence(id="mit", languages=("en",))),
        (
            "README.md",
            "---\nlicense: other\nlicense_name: my-terms\nlicense_link: https://example.com/terms\n---\n",
            Licence(id="other", name="my-terms", link="https://example.com/terms"),
        ),
        ("README.md", "---\nlicense: other\nlicense_link: javascript:alert(1)\n---\n", Licence(id="other")),
        ("README.md", "---\nlicense: [mit]\n---\n", Licence()),
        ("README.md", "---\nlicense: {a\n---\n", Licence()),
        ("README.md", "# no metadata\nlicense: mit\n", Licence()),
        ("LICENSE", APACHE, Licence(id="apache-2.0")),
        ("LICENSE", "MIT License\n\nCopyright (c) 2024 Somebody", Licence(id="mit")),
        ("LICENSE.txt", "Terms of ours", Licence(id="other", name="see-the-base-model")),
        ("LICENSE", "", Licence()),
    ],
)
def test_what_a_folder_states(tmp_path: Path, name: str, text: str, found: Licence) -> None:
    (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == found


def test_the_card_wins_over_the_licence_file(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    (tmp_path / "LICENSE").write_text(APACHE)
    assert licence_of(tmp_path).id == "gemma"


def test_no_folder_states_nothing(tmp_path: Path) -> None:
    assert licence_of(None) == licence_of(tmp_path / "none") == Licence()


def test_the_embedded_model_states_its_licence(tiny: Path) -> None:
    assert licence_of(tiny).id == "mit"


def test_a_bomb_of_aliases_is_no_trouble() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)), "license: mit"]
    assert front_matter("---\n" + "\n".join(lines) + "\n---\n")["license"] == "mit"

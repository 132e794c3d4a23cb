import re
import shutil
from html.parser import HTMLParser
from typing import Any

import pytest

from mlxtune.report import build, html
from mlxtune.rundir import RunDir

VOID = {"meta", "line", "rect", "circle", "polyline", "wbr"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects tags, attributes and texts."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(report: dict[str, Any]) -> Page:
    page = Page(html.render(report))
    assert page.open == []
    return page


def test_the_page_is_whole_and_needs_nothing_from_outside(run: RunDir) -> None:
    text = html.render(build.build(run))
    page = parsed(build.build(run))
    assert text.startswith("<!doctype html>\n") and text.endswith("</html>\n")
    assert not {"script", "img", "link", "iframe", "a", "object"} & set(page.tags)
    assert not {"src", "href", "style"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("svg") == 2
    assert "prefers-color-scheme:dark" in text and "@media print" in text and "width=device-width" in text


def test_the_page_says_what_the_report_says(run: RunDir) -> None:
    report = build.build(run)
    page = parsed(report)
    shown = " ".join(" ".join(page.texts).split())
    headline = page.texts[page.texts.index("\n", page.texts.index("Tuning report · tiny · " + str(run.root))) + 1]
    assert headline.replace("\xa0", " ") == report["verdict"]
    assert ("class", "better") in page.attributes
    for words in (
        "best: 0.246 at update 210",
        "91.7 % (84-96)",
        "(right: the exact text)",
        "Shown are 3 of the wrong and 5 of the right ones",
        "rows that appear more than once they were kept on one side of the split",
        f"mlxtune chat --model {run.fused}",
        "82,432 parameters (6 % of the model)",
        "Darwin 24.5.0, Apple M2 (metal), 10 cores, 16.0 GB memory",
        "0c" * 32,
        "Written by mlxtune 0.1.0 from the files of the run",
    ):
        assert words in shown
    assert page.texts.count("✗ wrong") == 8 + 3 and page.texts.count("✓ right") == 5


@pytest.mark.parametrize("text", ["</style><script>x</script>", "\"'><b onclick=x>", "a\x00\x1b[2J\u202eb", "&lt;"])
def test_no_text_becomes_markup(run: RunDir, text: str) -> None:
    clean = build.build(run)
    tags = parsed(clean).tags
    report = build.build(run)
    report["recipe_text"] = report["paths"]["run"] = report["paths"]["fused"] = text
    report["origin"]["model"]["name"] = report["origin"]["versions"]["mlxtune"] = text
    report["audit"]["details"][0].update(kind=text, detail=text, advice=text)
    for each in report["samples"]["shown"]:
        each.update(where=text, prompt=text, expected=text, base=text, answer=text)
    page = parsed(report)
    assert page.tags == tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "".join(page.texts).isprintable() or not re.search("[\x00-\x08\x0b-\x1f\u202e]", "".join(page.texts))


def test_an_empty_answer_is_named(run: RunDir) -> None:
    report = build.build(run)
    report["samples"]["shown"][0]["answer"] = " \n"
    assert "(empty)" in parsed(report).texts


def test_an_unfinished_run_has_a_page(run: RunDir) -> None:
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.fused)
    for path in (run.log, run.origin, run.evaluation("base"), run.evaluation("tuned"), run.evaluation("fused")):
        path.unlink()
    page = parsed(build.build(run))
    assert "svg" not in page.tags
    assert "What is missing" in page.texts and "How to use it" not in page.texts
    assert "Tuning report: a model" in page.texts
    assert "Data" in page.texts

import re
import shutil
from html.parser import HTMLParser
from typing import Any

import pytest

from mlxtune.report import build, html
from mlxtune.rundir import RunDir
from tests import reported

VOID = {"meta", "path", "wbr"}


TITLES = [
    "Compared on the same 96 rows", "Before and after", "Loss while training", "Accuracy",
    "Does it know when it is right?", "Learned and forgotten", "Would more rows help?", "Label by label, fused model",
    "What changed", "What it answers now", "How to use it", "Data", "Training", "What fusing cost",
    "Where it comes from, and how to make it again",
]  # fmt: skip


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


def test_the_page_is_whole_and_needs_nothing_from_outside(compared: RunDir) -> None:
    text = html.render(build.build(compared))
    page = parsed(build.build(compared))
    assert text.startswith("<!doctype html>\n") and text.endswith("</html>\n")
    assert not {"script", "img", "link", "iframe", "a", "object", "use", "form"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "id", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("svg") == 6
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes
    assert "prefers-color-scheme:dark" in text and "@media print" in text and "width=device-width" in text


def test_a_comparison_leads_the_page(compared: RunDir) -> None:
    report = build.build(compared)
    page = parsed(report)
    shown = " ".join("".join(page.texts).split())
    headings = [text for text in page.texts if text in TITLES]
    assert headings == TITLES
    assert (
        shown.index("Tuning is worth it")
        < shown.index("after adjusting for 2 comparisons")
        < shown.index("Compared on")
    )
    for words in (
        "few shot4 nearest training rows50 %40-60--2125",  # the row of the best untuned candidate
        "+41.7+27.9 to +53.7< 0.001",
        "Difference: from few shot, the best candidate that was not tuned",
        "retrieval was left out: the training rows are too long",
        "1 held-out row is nearly the same as a training row.",
        "On 4,096 tokens of other text the loss went from 2.264 to 2.711 nats per token by tuning",
        "Twice the data would bring about +2.3 points.",
        "From few shot to tuned: 48 rows became right and 8 wrong.",
        "Where it is at least 55.6 % sure, 95.3 % of its labels are right (wanted: 95 %)",
        "access0.831.000.9124",
    ):
        assert words in shown, words
    assert "ins" in page.tags and "del" in page.tags


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
        "(right: the expected label)",
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
    assert page.tags.count("svg") == 4


@pytest.mark.parametrize(
    "text",
    [
        "</style></svg><script>x</script>",
        "\"'><b onclick=x>",
        "a\x00\x1b[2J\u202eb",
        "&lt;",
        "$\\frac{1}{2}$",
        "你好 🙂",
    ],
)
def test_no_text_becomes_markup(compared: RunDir, text: str) -> None:
    """Each text of each file is replaced, so that none can be forgotten."""
    reported.spoil(compared, "plain")
    tags = parsed(build.build(compared)).tags
    reported.spoil(compared, text)
    page = parsed(build.build(compared))
    assert page.tags == tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", "".join(page.texts))


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

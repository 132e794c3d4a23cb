import re
from typing import Any

from mlxtune.report import build, markdown
from mlxtune.rundir import RunDir
from tests import reported


def test_the_page_has_its_parts_in_order(run: RunDir) -> None:
    page = markdown.render(build.build(run))
    assert re.findall(r"^##? .*", page, re.MULTILINE) == [
        "# Tuning report",
        "## Before and after",
        "## Label by label, fused model",
        "## What it answers now",
        "## Data",
        "## Training",
        "## What fusing cost",
        "## How to use it",
        "## Where it comes from",
        "## Recipe",
        "## sha256 of the files",
    ]
    assert page.endswith("```\n")


def test_the_table_is_the_scores(run: RunDir) -> None:
    page = markdown.render(build.build(run))
    assert "| accuracy | 0 % (0-4) | 91.7 % (84-96) | 89.6 % (82-94) |\n" in page
    assert "| size on disk | 5.5 MB | 5.8 MB | 5.5 MB |\n" in page
    assert f"```sh\nmlxtune chat --model {run.fused}\n```" in page
    assert "- sha256 of tickets.jsonl: 0c0c" in page
    assert "- machine: Darwin 24.5.0, Apple M2 (metal), 10 cores, 16.0 GB memory\n" in page
    assert "- best validation loss: 0.246 at step 210 (before: 2.710)\n" in page
    assert "Against the base, 86 became right and 0 wrong. Shown are 3 of the wrong and 5 of the right ones" in page


def spoiled(run: RunDir, text: str) -> str:
    report: dict[str, Any] = build.build(run)
    report["origin"]["model"]["name"] = text
    report["samples"]["shown"] = report["samples"]["shown"][:1]
    report["samples"]["shown"][0].update(prompt=text, answer=text)
    report["audit"]["details"][0]["detail"] = text
    return markdown.render(report)


def test_texts_cannot_become_markup(run: RunDir) -> None:
    page = spoiled(run, "a | b <img src=x>\n# *Title* [x](y) \x1b[0m")
    assert "| duplicate | 12 | a \\| b &lt;img src=x&gt; \\# \\*Title\\* \\[x\\](y) ␛\\[0m |\n" in page
    assert "- model: a \\| b &lt;img" in page
    assert "\x1b" not in page


def test_a_fence_in_an_answer_does_not_end_its_block(run: RunDir) -> None:
    page = spoiled(run, "```\n# out\n````")
    assert "Prompt:\n\n`````\n```\n# out\n````\n`````\n" in page


def test_a_comparison_leads(compared: RunDir) -> None:
    page = markdown.render(build.build(compared))
    assert re.findall(r"^## .*", page, re.MULTILINE)[:3] == [
        "## Compared on the same 96 rows",
        "## What changed",
        "## Before and after",
    ]
    assert (
        page.index("**Tuning is worth it") < page.index("after adjusting for 2 comparisons") < page.index("## Compared")
    )
    assert "| few shot | 50 % (40-60) | - | - | 212 | 5 | 21 ms | 0.31 GB | 5.5 MB |\n" in page
    assert "### data/test.jsonl:2: fixed\n" in page
    assert "Twice the data would bring about +2.3 points." in page


def test_no_text_of_a_file_becomes_markup(compared: RunDir) -> None:
    reported.spoil(compared, "plain")
    headings = [line for line in markdown.render(build.build(compared)).split("\n") if line.startswith("#")]
    reported.spoil(compared, "x <b> | *y*\n# title\n```")
    page = markdown.render(build.build(compared))
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1\n", "", page)
    assert len([line for line in outside.split("\n") if line.startswith("#")]) == len(headings)
    assert "<b>" not in outside and "| *y*" not in outside

"""A report as one HTML page without outside resources or scripts. Knows the report's value, not files.

Every text of the report is escaped in `markup`: answers of models may hold markup and control characters.
"""

from typing import Any

from mlxtune.report import chart, sections
from mlxtune.report.markup import bullets, facts, note, pair, row, section, table, text
from mlxtune.report.words import (
    chat_command,
    finding,
    metrics,
    provenance,
    samples_words,
    training_facts,
)
from mlxtune.report.words import table as score_table

STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--text:#1d2126;--muted:#5d6670;--line:#dfe1e4;
--accent:#1f6fb2;--train:#9aa3ad;--good:#1a7f4b;--bad:#b3372f;--unsure:#8a6100;--field:#f1f2f3;--new:#cdebd8;--gone:#f7d6d2}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--text:#e8eaec;--muted:#a0a8b0;--line:#363c42;
--accent:#62a8e5;--train:#7d8791;--good:#56c98a;--bad:#f08a80;--unsure:#e0b354;--field:#262b30;--new:#1f4a33;--gone:#5a2723}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:1.5rem 1rem 3rem}
header p{margin:0;color:var(--muted);overflow-wrap:anywhere}
h1,h2,h4,summary,.why{overflow-wrap:anywhere}
h1{font-size:1.35rem;line-height:1.4;font-weight:600;margin:.6rem 0 1.2rem;padding:1rem 1.1rem;background:var(--card);
border:1px solid var(--line);border-left:6px solid var(--muted);border-radius:6px}
h1.better{border-left-color:var(--good)}h1.worse{border-left-color:var(--bad)}h1.unclear,h1.enough{
border-left-color:var(--unsure)}
h2{font-size:1.1rem;margin:0 0 .7rem}
section{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:1rem 1.1rem;margin:0 0 1rem}
section p{margin:.6rem 0 0}.note{color:var(--muted);font-size:.9rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.45rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}tr:last-child td{border-bottom:0}
thead th{color:var(--muted);font-weight:600}
table.list thead th{overflow-wrap:normal;white-space:nowrap}td b{font-weight:600;white-space:nowrap}
td span{display:block;color:var(--muted);font-size:.85rem;white-space:nowrap}
table.list td,table.list th{text-align:left;overflow-wrap:anywhere}table.list td:first-child{overflow-wrap:normal}
wbr{display:none}.note+ul{margin-top:.6rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
.charts section{margin:0}.charts{margin:0 0 1rem}
p+.sample{margin-top:.8rem}.sample{border-top:1px solid var(--line);padding:.8rem 0}.sample:last-child{padding-bottom:0}
.sample h3{font-size:.85rem;font-weight:600;color:var(--muted);margin:0 0 .4rem;overflow-wrap:anywhere}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.prompt{background:var(--field);border-radius:4px;padding:.5rem .7rem;margin-bottom:.5rem;font-size:.93rem}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,14rem),1fr));gap:.5rem 1rem}
.answers h4{font-size:.85rem;font-weight:400;color:var(--muted);margin:0 0 .2rem}
ins,del{text-decoration:none;border-radius:3px;padding:0 .1em}ins{background:var(--new)}del{background:var(--gone)}
tr.tuned td:first-child b{color:var(--accent)}td:first-child b{white-space:normal}
td:first-child span{white-space:normal}table.wide td:first-child{min-width:11rem}
table.wide th,table.wide td{padding-left:.35rem;padding-right:.35rem}table.wide td:first-child{padding-left:0}
h1+.why{margin:-.4rem 0 1.2rem;padding:0 1.1rem;color:var(--muted)}.why li{margin:.15rem 0}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1rem;margin:0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.right,.wrong{font-size:.8rem;font-weight:600;white-space:nowrap;margin-left:.3rem}
.right{color:var(--good)}.wrong{color:var(--bad)}
pre{margin:.6rem 0 0;padding:.7rem .8rem;background:var(--field);border-radius:4px;overflow-x:auto;
font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
.facts dt{max-width:14rem;overflow-wrap:anywhere}summary{cursor:pointer;margin-top:.8rem}
ul{margin:0;padding-left:1.2rem}
footer{color:var(--muted);font-size:.85rem}
@media (max-width:34rem){h1{font-size:1.15rem}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}
table{font-size:.92rem}th,td{padding:.4rem .05rem .4rem .2rem}wbr{display:inline}table.wide wbr{display:none}
td b,td span{white-space:normal}
table.wide td+td b,table.wide td+td span{white-space:nowrap}table.wide td:first-child{min-width:0}
table.wide td:first-child span{display:none}td span{font-size:.78rem}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--text:#000;--muted:#444;--line:#bbb;--accent:#1f6fb2;
--train:#888;--good:#155f39;--bad:#8f2a24;--unsure:#6b4b00;--field:#f3f3f3;--new:#cdebd8;--gone:#f7d6d2}ins{text-decoration:underline}
del{text-decoration:line-through}main{max-width:none;padding:0}
section,.sample{break-inside:avoid}section.long{break-inside:auto}pre{white-space:pre-wrap}
.scroll{overflow:visible}.scroll svg{min-width:0!important}
table{font-size:.75rem}td span{font-size:.68rem}th,td{padding:.3rem .2rem}wbr{display:inline}
.charts{grid-template-columns:1fr 1fr}td span{white-space:normal}table.wide td:first-child{min-width:7rem}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def render(report: dict[str, Any]) -> str:
    """The page, ending with a line end."""
    origin = report["origin"]
    model = origin["model"]["name"] if origin else "a model"
    parts = [
        section("What is missing", bullets(report["missing"])),
        sections.comparison(report),
        _scores(report),
        sections.charts(report),
        sections.classes(report),
        sections.flips(report),
        _samples(report["samples"]),
        _use(report),
        _data(report),
        section("Training", facts(training_facts(report)) if report["training"] else ""),
        sections.fusing(report),
        _provenance(report),
    ]
    version = f" {text(origin['versions']['mlxtune'])}" if origin and "mlxtune" in origin["versions"] else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    why = f'<div class="why">{bullets(report["reasons"])}</div>\n' if report["reasons"] else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Tuning report: {text(model)}</title>
<style>{STYLE}{chart.STYLE}</style>
</head>
<body>
<main>
<header><p>Tuning report · {text(model)} · {text(report["paths"]["run"])}</p></header>
<h1 class="{text(report["outcome"])}">{text(report["verdict"]).replace(" %", "&nbsp;%")}</h1>
{why}{"".join(parts)}
<footer>Written by mlxtune{version} from the files of the run; <code>mlxtune report</code> writes it again,
<code>mlxtune verify</code> computes its figures again.</footer>
</main>
</body>
</html>
"""


def _scores(report: dict[str, Any]) -> str:
    rows = [row(cells) for cells in score_table(report, metrics(report))]
    told = (
        "Below each figure: its 95 % interval over the held-out rows. Loss in nats per token, lower is better, as is "
        "perplexity. Tuned is the base with its adapter; fused is one model that needs no adapter."
    )
    change = (
        f"<p>{text(report['change']).replace(' %', '&nbsp;%')}</p>"
        if report["change"] not in (None, report["verdict"])
        else ""
    )
    return section("Before and after", table(["", "base", "tuned", "fused"], rows) + change + note(told))


def _samples(samples: dict[str, Any] | None) -> str:
    if samples is None:
        return ""
    body = "".join(_sample(each, samples["column"]) for each in samples["shown"])
    return section("What it answers now", f"<p>{text(samples_words(samples))}</p>\n{body}", "long")


def _sample(each: dict[str, Any], column: str) -> str:
    before, after = pair(each["base"] or "", each["answer"])
    answers = [("base", each["base_right"], before)] if each["base"] is not None else []
    if not answers:
        _, after = pair(each["answer"], each["answer"])
    return sections.sample(each["where"], each["prompt"], each["expected"], [*answers, (column, each["right"], after)])


def _use(report: dict[str, Any]) -> str:
    command = chat_command(report)
    if command is None:
        return ""
    told = "The folder also loads in plain mlx-lm." if report["paths"]["fused"] else "The adapter has not been fused."
    return section("How to use it", f"<pre>{text(command)}</pre>\n{note(told)}")


def _data(report: dict[str, Any]) -> str:
    audit = report["audit"]
    counts = [f"{count:,} {name}" for name, count in report["rows"].items() if count is not None]
    body = f"<p>Rows: {', '.join(counts)}.</p>\n" if counts else ""
    if audit is not None and audit["details"]:
        rows = [
            f"<tr><td>{text(finding(each['kind']))}</td><td>{each['count']:,}</td>"
            f'<td>{text(each["detail"])} <span class="note">{text(each["advice"])}</span></td></tr>'
            for each in audit["details"]
        ]
        body += table(["finding", "rows", "detail"], rows, "list")
    elif audit is not None:
        body += f"<p>The audit of {audit['rows']:,} rows found nothing to mend.</p>"
    return section("Data", body)


def _provenance(report: dict[str, Any]) -> str:
    body = facts(provenance(report))
    if report["recipe_text"] is not None:
        body += f"\n<details><summary>The whole recipe</summary>\n<pre>{text(report['recipe_text'])}</pre></details>"
        body += note("To make it again: save the recipe, then let mlxtune run it with the data and the versions above.")
    if report["files"]:
        hashed = "\n".join(f"{digest}  {name}" for name, digest in report["files"].items())
        body += (
            f"\n<details><summary>sha256 of {len(report['files'])} files</summary>\n<pre>{text(hashed)}</pre></details>"
        )
    return section("Where it comes from, and how to make it again", body, "long")

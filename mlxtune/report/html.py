"""A report as one HTML page without outside resources or scripts. Knows the report's value, not files.

Every text of the report passes through `_text`: answers of models may hold markup and control characters.
"""

import html
from typing import Any

from mlxtune.report import chart
from mlxtune.report.words import (
    COLUMNS,
    chat_command,
    metric_name,
    metrics,
    provenance,
    samples_words,
    scores,
    table,
    training_facts,
    visible,
)

STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--text:#1d2126;--muted:#5d6670;--line:#dfe1e4;
--accent:#1f6fb2;--train:#9aa3ad;--good:#1a7f4b;--bad:#b3372f;--unsure:#8a6100;--field:#f1f2f3}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--text:#e8eaec;--muted:#a0a8b0;--line:#363c42;
--accent:#62a8e5;--train:#7d8791;--good:#56c98a;--bad:#f08a80;--unsure:#e0b354;--field:#262b30}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
header p{margin:0;color:var(--muted);overflow-wrap:anywhere}
h1{font-size:1.35rem;line-height:1.4;font-weight:600;margin:.6rem 0 1.2rem;padding:1rem 1.1rem;background:var(--card);
border:1px solid var(--line);border-left:6px solid var(--muted);border-radius:6px}
h1.better{border-left-color:var(--good)}h1.worse{border-left-color:var(--bad)}h1.unclear{border-left-color:var(--unsure)}
h2{font-size:1.1rem;margin:0 0 .7rem}
section{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:1rem 1.1rem;margin:0 0 1rem}
section p{margin:.6rem 0 0}.note{color:var(--muted);font-size:.9rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.45rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}tr:last-child td{border-bottom:0}
thead th{color:var(--muted);font-weight:600}td b{font-weight:600;white-space:nowrap}
td span{display:block;color:var(--muted);font-size:.85rem;white-space:nowrap}
table.list td,table.list th{text-align:left;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
.charts section{margin:0}.charts{margin:0 0 1rem}
p+.sample{margin-top:.8rem}.sample{border-top:1px solid var(--line);padding:.8rem 0}.sample:last-child{padding-bottom:0}
.sample h3{font-size:.85rem;font-weight:600;color:var(--muted);margin:0 0 .4rem;overflow-wrap:anywhere}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}
.prompt{background:var(--field);border-radius:4px;padding:.5rem .7rem;margin-bottom:.5rem;font-size:.93rem}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1rem;margin:0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.right,.wrong{font-size:.8rem;font-weight:600;white-space:nowrap;display:inline-block;min-width:4.4rem}
.right{color:var(--good)}.wrong{color:var(--bad)}
pre{margin:.6rem 0 0;padding:.7rem .8rem;background:var(--field);border-radius:4px;overflow-x:auto;
font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
.facts dt{max-width:14rem;overflow-wrap:anywhere}summary{cursor:pointer;margin-top:.8rem}
ul{margin:0;padding-left:1.2rem}
footer{color:var(--muted);font-size:.85rem}
@media (max-width:34rem){h1{font-size:1.15rem}.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.5rem}
table{font-size:.92rem}th,td{padding:.4rem .2rem .4rem 0}td b,td span{white-space:normal}td span{font-size:.78rem}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--text:#000;--muted:#444;--line:#bbb;--accent:#1f6fb2;
--train:#888;--good:#155f39;--bad:#8f2a24;--unsure:#6b4b00;--field:#f3f3f3}main{max-width:none;padding:0}
section,.sample{break-inside:avoid}section.long{break-inside:auto}pre{white-space:pre-wrap}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def render(report: dict[str, Any]) -> str:
    """The page, ending with a line end."""
    origin = report["origin"]
    model = origin["model"]["name"] if origin else "a model"
    sections = [
        _missing(report["missing"]),
        _scores(report),
        _charts(report),
        _samples(report["samples"]),
        _use(report),
        _data(report),
        _section("Training", _facts(training_facts(report)) if report["training"] else ""),
        _provenance(report),
    ]
    version = f" {_text(origin['versions']['mlxtune'])}" if origin and "mlxtune" in origin["versions"] else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Tuning report: {_text(model)}</title>
<style>{STYLE}{chart.STYLE}</style>
</head>
<body>
<main>
<header><p>Tuning report · {_text(model)} · {_text(report["paths"]["run"])}</p></header>
<h1 class="{_text(report["outcome"])}">{_text(report["verdict"]).replace(" %", "&nbsp;%")}</h1>
{"".join(sections)}
<footer>Written by mlxtune{version} from the files of the run; <code>mlxtune report</code> writes it again.</footer>
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    return html.escape(visible(text))


def _section(title: str, body: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f"<section{named}>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def _facts(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(words)}</dd>\n" for name, words in facts)
    return f'<dl class="facts">\n{rows}</dl>' if facts else ""


def _missing(missing: list[str]) -> str:
    body = "".join(f"<li>{_text(each)}</li>" for each in missing)
    return _section("What is missing", f"<ul>{body}</ul>" if body else "")


def _scores(report: dict[str, Any]) -> str:
    rows = []
    for name, *cells in table(report, metrics(report)):
        rows.append(f"<tr><td>{_text(name)}</td>{''.join(_cell(cell) for cell in cells)}</tr>")
    body = (
        '<div class="scroll"><table>\n<thead><tr><th></th><th>base</th><th>tuned</th><th>fused</th></tr></thead>\n'
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n"
        '<p class="note">Below each figure: its 95 % interval over the held-out rows. Loss in nats per token, lower is '
        "better, as is perplexity. Tuned is the base with its adapter; fused is one model that needs no adapter.</p>"
    )
    return _section("Before and after", body)


def _cell(cell: str) -> str:
    figure, _, interval = cell.partition(" (")
    below = f"<span>{_text(interval.rstrip(')')).replace('-', '-<wbr>')}</span>" if interval else ""
    return f"<td><b>{_text(figure)}</b>{below}</td>"


def _charts(report: dict[str, Any]) -> str:
    best = report["training"]["best_step"] if report["training"] else None
    by_column = {column: scores(report, column) for column in COLUMNS}
    metric = next((m for m in ("accuracy", "exact_match") if any(m in found for found in by_column.values())), None)
    shares = [(column, found[metric]) for column, found in by_column.items() if metric in found]
    drawn = _section("Loss while training", chart.loss_curve(report["curve"], best))
    if metric is not None:
        drawn += _section(metric_name(metric).capitalize(), chart.bars(shares))
    return f'<div class="charts">\n{drawn}</div>\n' if drawn else ""


def _samples(samples: dict[str, Any] | None) -> str:
    if samples is None:
        return ""
    body = "".join(_sample(each, samples["column"]) for each in samples["shown"])
    return _section("What it answers now", f"<p>{_text(samples_words(samples))}</p>\n{body}", "long")


def _sample(sample: dict[str, Any], column: str) -> str:
    rows = [("expected", _words(sample["expected"]))]
    if sample["base"] is not None:
        rows.append(("base", _mark(sample["base_right"]) + _words(sample["base"])))
    rows.append((column, _mark(sample["right"]) + _words(sample["answer"])))
    answers = "".join(f'<dt>{name}</dt><dd class="text">{words}</dd>' for name, words in rows)
    return (
        f'<div class="sample"><h3>{_text(sample["where"])}</h3>'
        f'<div class="text prompt">{_words(sample["prompt"])}</div><dl>{answers}</dl></div>\n'
    )


def _words(text: str) -> str:
    return _text(text.strip("\n")) if text.strip() else "<i>(empty)</i>"


def _mark(right: bool) -> str:
    return '<span class="right">✓ right</span>' if right else '<span class="wrong">✗ wrong</span>'


def _use(report: dict[str, Any]) -> str:
    command = chat_command(report)
    if command is None:
        return ""
    words = "The folder also loads in plain mlx-lm." if report["paths"]["fused"] else "The adapter has not been fused."
    return _section("How to use it", f'<pre>{_text(command)}</pre>\n<p class="note">{words}</p>')


def _data(report: dict[str, Any]) -> str:
    audit = report["audit"]
    counts = [f"{count:,} {name}" for name, count in report["rows"].items() if count is not None]
    body = f"<p>Rows: {', '.join(counts)}.</p>\n" if counts else ""
    if audit is not None and audit["details"]:
        rows = "".join(
            f"<tr><td>{_text(each['kind'].replace('_', ' '))}</td><td>{each['count']:,}</td>"
            f"<td>{_text(each['detail'])} <span class='note'>{_text(each['advice'])}</span></td></tr>\n"
            for each in audit["details"]
        )
        heads = "<thead><tr><th>finding</th><th>rows</th><th>detail</th></tr></thead>"
        body += f'<div class="scroll"><table class="list">\n{heads}\n<tbody>\n{rows}</tbody></table></div>'
    elif audit is not None:
        body += f"<p>The audit of {audit['rows']:,} rows found nothing to mend.</p>"
    return _section("Data", body)


def _provenance(report: dict[str, Any]) -> str:
    body = _facts(provenance(report))
    if report["recipe_text"] is not None:
        body += f"\n<details><summary>The whole recipe</summary>\n<pre>{_text(report['recipe_text'])}</pre></details>"
    return _section("Where it comes from", body, "long")

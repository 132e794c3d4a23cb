"""Figures and texts as people read them, for the terminal, Markdown and HTML alike. Knows no colours and no layout."""

import re
import shlex
from typing import Any

from mlxtune.report.score import Score

COLUMNS = ("base", "tuned", "fused")
METRIC_NAMES = {
    "loss": "held-out loss",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "label_accuracy": "accuracy by probabilities",
    "outside_labels": "answers outside the labels",
    "ece": "calibration error",
    "token_accuracy": "token accuracy",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "json_valid": "valid JSON",
    "json_schema": "JSON that fits the schema",
    "pattern": "answers that fit the pattern",
    "answer_length": "answer length",
    "refusals": "refusals",
}

# what would not show, or would turn the text around it: bidirectional embeddings and overrides, lone surrogates
_UNSEEN = re.compile("[\x80-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}


def visible(text: str) -> str:
    """A text whose control characters are shown as symbols (`␛`) and whose line ends are all `\\n`."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n").translate(_CONTROL))


def shorten(text: str, longest: int = 600) -> str:
    """A text of at most `longest` characters, cut in its middle: the end of a prompt often holds the question."""
    if len(text) <= longest:
        return text
    cut = " […] "
    head = (longest - len(cut)) * 2 // 3
    return text[:head] + cut + text[len(text) - (longest - len(cut) - head) :]


def percent(share: float) -> str:
    """`91.7 %`; three decimals at most keep a nearly whole share apart from `100 %`, a tiny one from `0 %`."""
    for decimals in (1, 2, 3):
        text = f"{share * 100:.{decimals}f}"
        if float(text) not in (0, 100) or share in (0, 1):
            break
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def number(value: float) -> str:
    """As many decimals as say something: `0.412`, `23.1`, `1,530`, `0.0021`."""
    if abs(value) >= 1e7:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def value(score: Score) -> str:
    return percent(score.value) if score.unit == "share" else number(score.value)


def interval(score: Score) -> str:
    """The 95 % interval as `84-96` (per cent) or `0.391-0.433`, finer where whole per cents say little."""
    if score.unit != "share":
        return f"{number(score.ci_low)}-{number(score.ci_high)}"
    decimals = 0 if score.ci_high - score.ci_low >= 0.02 else 1
    return f"{score.ci_low * 100:.{decimals}f}-{score.ci_high * 100:.{decimals}f}"


def figure(score: Score) -> str:
    """A value with its interval: `91.7 % (84-96)`."""
    return f"{value(score)} ({interval(score)})"


def size(n: float) -> str:
    """Bytes for people: `5.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def scores(report: dict[str, Any], column: str) -> dict[str, Score]:
    """The scores of `base`, `tuned` or `fused` by metric; empty where they are missing."""
    return {each["metric"]: Score(**each) for each in report[column]}


def metrics(report: dict[str, Any]) -> list[str]:
    """The metrics that any column has, in the order of `METRIC_NAMES`, then others."""
    found = {each["metric"] for column in COLUMNS for each in report[column]}
    return [name for name in METRIC_NAMES if name in found] + sorted(found - METRIC_NAMES.keys())


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def finding(kind: str) -> str:
    """What a kind of the audit's findings is called."""
    return "personal data" if kind == "pii" else kind.replace("_", " ")


def size_cells(report: dict[str, Any]) -> list[str]:
    """What each column takes on the disk: the original base, the (quantized) base with its adapter, the fused model."""
    sizes = report["sizes_bytes"]
    base = sizes["base"] if sizes["quantized"] is None else sizes["quantized"]
    tuned = None if base is None or sizes["adapter"] is None else base + sizes["adapter"]
    return ["-" if each is None else size(each) for each in (sizes["base"], tuned, sizes["fused"])]


def table(report: dict[str, Any], shown: list[str]) -> list[list[str]]:
    """Rows of name, base, tuned, fused for the given metrics, then the size on the disk."""
    columns = [scores(report, column) for column in COLUMNS]
    rows = [
        [metric_name(metric), *(figure(column[metric]) if metric in column else "-" for column in columns)]
        for metric in shown
    ]
    return [*rows, ["size on disk", *size_cells(report)]]


def comparison_table(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a comparison: score, difference from the best untuned candidate, and what each costs."""
    metric = comparison["metric"]
    shown = metric_name(metric) if metric else "score"
    headings = ["", shown, "difference", "p", "prompt tokens", "answer tokens", "time a row", "memory", "size"]
    rows = []
    for each in comparison["candidates"]:
        score = next((Score(**found) for found in each["scores"] if found["metric"] == metric), None)
        cost, difference = each.get("cost") or {}, each.get("difference")
        p = None if difference is None else difference.get("p_adjusted", difference.get("p"))
        rows.append(
            [
                visible(each["name"]).replace("_", " "),
                figure(score) if score is not None else "-",
                difference_words(difference, score),
                "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
                *(_cost(cost.get(name), "{:,.0f}") for name in ("prompt_tokens", "answer_tokens")),
                _time(cost.get("seconds_per_row")),
                _cost(cost.get("peak_memory_gb"), "{:.2f} GB"),
                "-" if cost.get("bytes") is None else size(cost["bytes"]),
            ]
        )
    return headings, rows


def _time(seconds: float | None) -> str:
    """`27 ms`, `1.25 s`."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _cost(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def difference_words(difference: dict[str, Any] | None, score: Score | None) -> str:
    """`+12.3 (+8.1 to +16.0)`, in points where the metric is a share; `-` for what the others are held against."""
    if difference is None or score is None:
        return "-"
    ends = [difference[name] for name in ("value", "ci_low", "ci_high")]
    if score.unit == "share":
        value, low, high = (f"{end * 100:+.1f}" for end in ends)
    else:
        value, low, high = (f"{end:+.3f}" if end == 0 or abs(end) >= 0.0005 else f"{end:+.1g}" for end in ends)
    return f"{value} ({low} to {high})"


def forgetting_rows(report: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Losses before and after tuning: of the held-out rows, and of the text that shows what was forgotten."""
    forgetting = (report["comparison"] or {}).get("forgetting")
    if forgetting is None:
        return []
    base, tuned = (scores(report, column).get("loss") for column in ("base", "tuned"))
    rows = [("held-out rows", base.value, tuned.value)] if base is not None and tuned is not None else []
    return [*rows, (f"other text: {forgetting['anchor']}", forgetting["base_loss"], forgetting["tuned_loss"])]


def forgetting_words(forgetting: dict[str, Any]) -> str:
    """What happened to other text, in a sentence or two."""
    before, after = forgetting["base_loss"], forgetting["tuned_loss"]
    words = f"On {forgetting['tokens']:,} tokens of other text the loss went from {number(before)} to {number(after)} "
    words += "nats per token by tuning"
    if forgetting.get("kl") is not None:
        error = f" ± {number(forgetting['kl_error'])}" if forgetting.get("kl_error") is not None else ""
        words += f"; the predictions are {number(forgetting['kl'])}{error} nats per token (KL) from the base's"
    words += "."
    choices = forgetting.get("choices")
    if choices is not None:
        base, tuned = Score(**choices["base"]), Score(**choices["tuned"])
        words += f" Of {choices['n']:,} multiple-choice questions, {figure(base)} were right before, "
        words += f"{figure(tuned)} after."
    return words


def fuse_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What fusing, and packing into fewer bits, cost: losses on the validation rows and what they say."""
    fuse = report["fuse"]
    if fuse is None:
        return []
    losses = [("base", "base_loss"), ("base + adapter", "adapter_loss"), ("fused", "fused_loss")]
    facts = [(f"validation loss, {name}", number(fuse[key])) for name, key in losses if fuse.get(key) is not None]
    if fuse["kept"] is not None:
        facts.append(("share of the gain that is kept", percent(fuse["kept"])))
    if fuse.get("kl") is not None:
        facts.append(("KL from base + adapter", f"{number(fuse['kl'])} nats per token"))
    if fuse.get("same_top") is not None:
        facts.append(("same most likely token", percent(fuse["same_top"])))
    if fuse.get("bits_per_weight") is not None:
        facts.append(("bits per weight", f"{fuse['bits_per_weight']:.2f}"))
    if fuse.get("raised"):
        facts.append(("layers with more bits", f"{len(fuse['raised']):,} of {fuse['layers']:,}"))
    facts.append(("measured on", f"{fuse['rows']:,} validation rows"))
    sizes = report["sizes_bytes"]
    changes = [
        (name, sizes[key]) for name, key in (("base", "base"), ("quantized base", "quantized"), ("fused", "fused"))
    ]
    facts.append(("size", " → ".join(f"{name} {size(each)}" for name, each in changes if each is not None)))
    return facts


def judged_words(judged: dict[str, Any]) -> str:
    """What a judge said of pairs of answers."""
    better, than = (judged[name].replace("_", " ") for name in ("better", "than"))
    return (
        f"A judge found the answers of {better} better than those of {than} in {judged['wins']:,} rows, "
        f"as good in {judged['ties']:,}, and worse in {judged['losses']:,}."
    )


def contamination_words(found: dict[str, Any]) -> str:
    """How many held-out rows could have been learned."""
    several = found["count"] != 1
    return f"{found['count']:,} held-out {'rows are' if several else 'row is'} nearly the same as a training row."


def flips_words(flips: dict[str, Any]) -> str:
    """How many rows changed sides between two candidates."""
    first, second = (visible(flips[end]).replace("_", " ") for end in ("from", "to"))
    return f"From {first} to {second}: {flips['fixed']:,} rows became right and {flips['broken']:,} wrong."


def coverage_words(coverage: dict[str, Any]) -> str:
    """How many rows the model could answer alone."""
    wanted = percent(coverage["target"])
    if coverage.get("threshold") is None or not coverage["coverage"]:
        return f"At no level of confidence are {wanted} of its labels right: a person should see every row."
    return (
        f"Where it is at least {percent(coverage['threshold'])} sure, {percent(coverage['precision'] or 0.0)} of its "
        f"labels are right (wanted: {wanted}); that is {percent(coverage['coverage'])} of the rows. "
        "The others are for a person."
    )


def chat_command(report: dict[str, Any]) -> str | None:
    """The command that chats with the result: the fused model, or the base with its adapter; None before training."""
    paths = report["paths"]
    if paths["fused"]:
        return f"mlxtune chat --model {shlex.quote(paths['fused'])}"
    base = paths["base"] or paths["model"]
    if paths["adapter"] and base:
        return f"mlxtune chat --model {shlex.quote(base)} --adapter-path {shlex.quote(paths['adapter'])}"
    return None


def training_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What training did, as names and figures."""
    training = report["training"]
    if training is None:
        return []
    share = training["trainable_parameters"] / training["parameters"] if training["parameters"] else 0.0
    facts = [
        ("rows", f"{training['rows']:,} ({training['epochs']:.3g} passes)"),
        ("updates", f"{training['steps']:,}"),
        ("tokens learned from", f"{training['trained_tokens']:,}"),
        ("time", duration(training["seconds"])),
        ("speed", f"{training['tokens_per_second']:,.0f} tokens a second"),
        ("peak memory", f"{training['peak_memory_gb']:.2f} GB"),
        ("adapter", f"{training['trainable_parameters']:,} parameters ({percent(share)} of the model)"),
    ]
    if training["best_valid_loss"] is not None:
        best = f"{number(training['best_valid_loss'])} at step {training['best_step']:,}"
        first = training["first_valid_loss"]
        facts.append(("best validation loss", best if first is None else f"{best} (before: {number(first)})"))
    return facts


def samples_words(samples: dict[str, Any]) -> str:
    """How many rows were wrong, and how the shown ones were chosen."""
    rows, wrong, shown = samples["rows"], samples["wrong"], samples["shown"]
    shown_wrong = sum(not each["right"] for each in shown)
    words = f"The {samples['column']} model answered {rows - wrong:,} of {rows:,} rows right and {wrong:,} wrong"
    words += " (right: the exact text). " if samples["measure"] == "exact match" else " (right: the expected label). "
    if samples["newly_right"] is not None:
        words += f"Against the base, {samples['newly_right']:,} became right and {samples['newly_wrong']:,} wrong. "
    if len(shown) < rows:
        words += (
            f"Shown are {shown_wrong} of the wrong and {len(shown) - shown_wrong} of the right ones, "
            f"taken evenly through the file; eval/{samples['column']}.jsonl has them all."
        )
    return words.rstrip()


def provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the run comes from: model, data, machine and versions, as names and texts."""
    origin = report["origin"]
    if origin is None:
        return []
    model, data, machine, versions = (origin[name] for name in ("model", "data", "machine", "versions"))
    revision = f" at {model['revision']}" if model.get("revision") else ""
    facts = [("model", f"{model['name']}{revision} ({size(model['bytes'])})")]
    facts += [(f"sha256 of {name}", digest) for name, digest in sorted(model.get("sha256", {}).items())]
    facts.append(("data", str(data["path"])))
    digests = data["sha256"] if isinstance(data["sha256"], dict) else {data["path"]: data["sha256"]}
    facts += [(f"sha256 of {name}", digest) for name, digest in sorted(digests.items())]
    device = f"{machine['device_name']} ({machine['device']})"
    memory = size(machine["memory_bytes"])
    facts.append(("machine", f"{machine['system']}, {device}, {machine['cores']} cores, {memory} memory"))
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if origin.get("seconds") is not None:
        facts.append(("whole run", duration(origin["seconds"])))
    return facts

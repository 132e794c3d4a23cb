"""The model card of a fused model or an adapter: the README.md that the hub shows. Knows facts, not their files.

Every text in it is escaped, and nothing in it is a path, a setting that could hold a secret, or a row of data.
"""

import re
from pathlib import Path
from typing import Any

from mlxtune.export.facts import COLUMNS, Facts, of_adapter, of_fused
from mlxtune.report.score import Score
from mlxtune.report.words import duration, figure, metric_name, number, percent, size, visible
from mlxtune.rundir import RunDir, write_text

HUB_METRICS = {"macro_f1": "f1", "rouge_l": "rouge"}  # the hub's names for ours
METHODS = {"lora": "LoRA", "dora": "DoRA", "full": "a tuning of all its weights"}
DECISIONS = {
    "tune": "A comparison on the same rows found tuning worth it against prompts and retrieval.",
    "prompt": "A comparison on the same rows found a prompt to be enough: the base does as well without this.",
    "retrieve": "A comparison on the same rows found that retrieval suits these rows better than this.",
    "cannot_tell": "A comparison on the same rows could not tell whether this is better than a prompt or retrieval.",
}
USE_FUSED = """\
```sh
mlxtune chat --model path/to/this/folder
```

It loads in plain mlx-lm as well:

```python
from mlx_lm import generate, load

model, tokenizer = load("path/to/this/folder")
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
print(generate(model, tokenizer, prompt=prompt))
```"""
USE_ADAPTER = """\
```sh
mlxtune chat --model path/to/the/base --adapter-path path/to/this/folder
mlx_lm.generate --model path/to/the/base --adapter-path path/to/this/folder --prompt "..."
```

The base must be the one that the adapter was trained on: mlxtune refuses another."""


def write_fused(folder: Path, run: RunDir | None = None) -> None:
    """Writes README.md into a fused folder, from its fuse.json and the files of the run that its adapter lies in."""
    write_text(folder / "README.md", card(of_fused(folder, run)))


def write_adapter(run: RunDir) -> None:
    """Writes README.md into the adapter folder of a run."""
    write_text(run.adapter / "README.md", card(of_adapter(run)))


def card(facts: Facts) -> str:
    """The whole README.md: metadata as YAML, then the text."""
    sections = [
        f"# {_plain(facts.name)}",
        _what(facts),
        _section("Figures", _figures(facts)),
        _section("What fusing kept", _kept(facts)),
        _section("Intended use and limits", _bullets(_limits(facts))),
        _section("How to run it", USE_FUSED if facts.kind == "fused" else USE_ADAPTER),
        _section("How it was made", _made(facts)),
    ]
    return f"---\n{metadata(facts).strip()}\n---\n\n" + "\n\n".join(each for each in sections if each) + "\n"


def metadata(facts: Facts) -> str:
    """The YAML of the card, as huggingface_hub reads it: library, licence, base and relation, data, and figures."""
    from huggingface_hub import EvalResult, ModelCardData

    column = facts.kind if facts.kind == "fused" and facts.scores.get("fused") else "tuned"
    shown = facts.scores.get(column, [])
    name = next(iter(facts.data), "own rows")
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=_repository_name(name),
            dataset_name=_one_line(name),
            dataset_split="test",
            dataset_revision=_one_line(facts.data[name]) if name in facts.data else None,
            metric_type=HUB_METRICS.get(each.metric, _repository_name(each.metric)),
            metric_name=_one_line(f"{metric_name(each.metric)}{f' ({each.unit})' if each.unit else ''}"),
            metric_value=round(each.value, 6),
            metric_args={"rows": each.n, "ci_95": [round(each.ci_low, 6), round(each.ci_high, 6)]},
        )
        for each in shown
    ]
    licence = facts.licence
    method = facts.adapter.get("fine_tune_type", "lora")
    tags = [
        "mlx",
        "mlxtune",
        *([method] if method in ("lora", "dora") else []),
        *(["merge"] if facts.parts > 1 else []),
    ]
    if facts.fuse.get("bits"):
        tags.append(f"{facts.fuse['bits']}-bit")
    hashed = [{"name": _one_line(each), "sha256": _one_line(digest)} for each, digest in sorted(facts.data.items())]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=tags,
        base_model="/".join(_repository_name(part) for part in facts.base.split("/")),
        base_model_relation=facts.relation,
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        language=list(licence.languages) or None,
        datasets=[_repository_name(each) for each in sorted(facts.data)] or None,
        dataset_files=hashed or None,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text


def _what(facts: Facts) -> str:
    base = _plain(facts.base) + (f" at revision {_plain(facts.revision)}" if facts.revision else "")
    method = METHODS.get(str(facts.adapter.get("fine_tune_type", "lora")), "LoRA")
    rows = f" on {facts.training['rows']:,} rows" if _is_number(facts.training.get("rows")) else ""
    if facts.kind == "adapter":
        return f"An adapter for {base}: {method}, trained{rows} by mlxtune. It is of use with that base only."
    several = f"{facts.parts} adapters, fused into it" if facts.parts > 1 else f"{method}{rows}, fused into one model"
    weight = facts.fuse.get("bits_per_weight")
    weights = size(facts.fuse["bytes"]) if _is_number(facts.fuse.get("bytes")) else ""
    how = f"{weight:.2f} bits per weight" if _is_number(weight) else ""
    volume = ", ".join(each for each in (weights, how) if each)
    return f"{base} with {several} by mlxtune{f': {volume}' if volume else ''}. It needs no adapter."


def _figures(facts: Facts) -> str:
    by_column = {name: {each.metric: each for each in facts.scores.get(name, [])} for name in COLUMNS}
    columns = [name for name in COLUMNS if by_column[name]]
    if not columns:
        return "It has not been scored on held-out rows."
    found = list(dict.fromkeys(metric for name in columns for metric in by_column[name]))
    rows = [
        [f"{metric_name(metric)}{_unit(by_column, metric)}", *(_cell(by_column[name].get(metric)) for name in columns)]
        for metric in found
    ]
    counts = sorted({each.n for name in columns for each in by_column[name].values()})
    over = f"{counts[-1]:,} held-out rows" if len(counts) == 1 else f"up to {counts[-1]:,} held-out rows"
    note = f"In parentheses: 95 % intervals over {over}, which were not trained on."
    if "tuned" in columns:
        note += " `tuned` is the base with the adapter" + (", `fused` this model." if "fused" in columns else ".")
    return f"{_table(['', *columns], rows)}\n\n{note}"


def _unit(by_column: dict[str, dict[str, Score]], metric: str) -> str:
    unit = next((found[metric].unit for found in by_column.values() if metric in found), "")
    return "" if unit in ("", "share") else f", {unit}"


def _cell(score: Score | None) -> str:
    return figure(score) if score is not None else "-"


def _kept(facts: Facts) -> str:
    fuse = facts.fuse
    if facts.kind != "fused" or not _is_number(fuse.get("fused_loss")):
        return "" if facts.kind != "fused" else "Not measured: there were no validation rows."
    rows = [
        ("loss of the base", _nats(fuse.get("base_loss"))),
        ("loss with the adapter", _nats(fuse.get("adapter_loss"))),
        ("loss of this model", _nats(fuse.get("fused_loss"))),
        ("share of the gain that is kept", percent(fuse["kept"]) if _is_number(fuse.get("kept")) else ""),
        ("KL divergence from base + adapter", _nats(fuse.get("kl"))),
        ("same most likely token", percent(fuse["same_top"]) if _is_number(fuse.get("same_top")) else ""),
    ]
    table = _table(["", ""], [[name, value] for name, value in rows if value])
    return f"{table}\n\nOn {_count(fuse.get('rows'), 'validation row')}, which chose the adapter but trained nothing."


def _limits(facts: Facts) -> list[str]:
    test = facts.rows.get("test", 0)
    limits = [
        "It is meant for inputs of the same kind as the rows that it was tuned on, in the same form; the figures above "
        "come from held-out rows of the same data and say nothing about others."
        if any(facts.scores.values())
        else "It is meant for inputs like the rows that it was tuned on. How well it does there is not measured."
    ]
    if 0 < test < 100:
        limits.append(f"{_count(test, 'held-out row')} are few: see how wide the intervals are.")
    if facts.decision in DECISIONS:
        limits.append(DECISIONS[str(facts.decision)])
    lost = [facts.forgetting.get(name) for name in ("base_loss", "tuned_loss")]
    if all(_is_number(each) for each in lost):
        limits.append(f"On other text the loss went from {_nats(lost[0])} to {_nats(lost[1])} by tuning.")
    else:
        limits.append("What the base knew may have been forgotten: that was not measured.")
    limits.append("Not measured: safety, bias, the truth of what it says, other languages than those of the rows.")
    personal = sum(count for kind, count in facts.findings.items() if kind == "pii")
    if personal:
        limits.append(
            f"The audit of the data found what looks like personal data in {_count(personal, 'place')}; "
            "a tuned model can repeat what it was trained on."
        )
    else:
        limits.append("A tuned model can repeat rows that it was trained on.")
    if facts.licence.id is None:
        limits.append("No licence was found beside the base's weights: find it out before you pass this on.")
    else:
        limits.append("The licence is the base's; that of the data may ask for more.")
    return limits


def _made(facts: Facts) -> str:
    training, lora = facts.training, facts.adapter.get("lora_parameters")
    facts_of: list[tuple[str, str]] = []
    if isinstance(lora, dict):
        told = [f"{key} {lora[key]:g}" for key in ("rank", "scale", "dropout") if _is_number(lora.get(key))]
        facts_of.append(("adapter", ", ".join(told)))
    if all(_is_number(training.get(key)) for key in ("steps", "best_step", "trained_tokens", "seconds")):
        facts_of.append(
            (
                "training",
                f"{training['steps']:,} updates, the best at {training['best_step']:,}; "
                f"{training['trained_tokens']:,} tokens learned from; {duration(training['seconds'])}",
            )
        )
    if facts.rows:
        facts_of.append(("rows", ", ".join(f"{count:,} {name}" for name, count in facts.rows.items())))
    facts_of += [(f"sha256 of {name}", digest) for name, digest in sorted(facts.data.items())]
    facts_of += [(f"sha256 of the base's {name}", digest) for name, digest in sorted(facts.base_hashes.items())]
    if facts.versions:
        facts_of.append(("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())))
    if facts.device:
        facts_of.append(("device", facts.device))
    parts = [_bullets([f"{name}: {text}" for name, text in facts_of if text])] if facts_of else []
    if facts.settings:
        parts.append(f"The recipe's settings, but for paths:\n\n```yaml\n{_yaml(facts.settings)}\n```")
    parts.append("Written by mlxtune from the files of the run.")
    return "\n\n".join(parts)


def _yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML; their values are numbers, switches, and names without a character that means something."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            lines.append(f"{_repository_name(name)}:")
            lines += [f"  {_repository_name(key)}: {_setting(each)}" for key, each in value.items()]
        else:
            lines.append(f"{_repository_name(name)}: {_setting(value)}")
    return "\n".join(lines)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_setting(each) for each in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) and not value.isalpha() else str(value)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _nats(value: Any) -> str:
    return f"{number(value)} nats per token" if _is_number(value) else ""


def _count(number: Any, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if isinstance(number, int) else f"some {noun}s"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e30


def _repository_name(text: str) -> str:
    """A text in the characters that names on the hub have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:96] or "unknown"


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())[:200]


def _plain(text: str) -> str:
    """A text on one line in which nothing is markup."""
    escaped = _one_line_of(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", escaped)


def _one_line_of(text: str) -> str:
    return " ".join(visible(text).split())

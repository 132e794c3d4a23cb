import pytest

from mlxtune.report import words
from mlxtune.report.score import Score


def share(value: float, low: float, high: float) -> Score:
    return Score(metric="accuracy", value=value, unit="share", ci_low=low, ci_high=high, n=96, better="higher")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.5, "50 %"),
        (1.0 - 1e-9, "100 %"),
        (0.91666, "91.7 %"),
        (0.9996, "99.96 %"),
        (0.0004, "0.04 %"),
        (0.1, "10 %"),
    ],
)
def test_percent_keeps_all_and_nothing_apart_from_nearly(value: float, text: str) -> None:
    assert words.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"),
        (0.41234, "0.412"),
        (9.9994, "9.999"),
        (23.1184, "23.1"),
        (1530.4, "1,530"),
        (0.00213, "0.0021"),
        (3e8, "3.00e+08"),
    ],
)
def test_number_keeps_what_says_something(value: float, text: str) -> None:
    assert words.number(value) == text


def test_figure_has_the_interval() -> None:
    assert words.figure(share(0.91666, 0.8413, 0.9603)) == "91.7 % (84-96)"
    # whole per cents would say nothing of a narrow interval
    assert words.figure(share(0.912, 0.9042, 0.9191)) == "91.2 % (90.4-91.9)"
    nats = Score(metric="loss", value=0.4123, unit="nats per token", ci_low=0.39, ci_high=0.43, n=9, better="lower")
    assert words.figure(nats) == "0.412 (0.390-0.430)"


@pytest.mark.parametrize(
    ("bytes_", "text"), [(0, "0 B"), (999, "999 B"), (5_500_000, "5.5 MB"), (2.5e12, "2.5 TB"), (1e15, "1000.0 TB")]
)
def test_size(bytes_: float, text: str) -> None:
    assert words.size(bytes_) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_visible_shows_control_characters_and_keeps_lines() -> None:
    assert words.visible("a\r\nb\tc\x1b[31m\x00\x7f\r") == "a\nb\tc␛[31m␀␡␍"
    assert words.visible("\x85\u202e\u2066\ud800") == "\ufffd" * 4
    assert words.visible("Grüße, 世界 🙂 \u200f") == "Grüße, 世界 🙂 \u200f"


def test_shorten_cuts_the_middle_and_keeps_both_ends() -> None:
    text = "".join(f"{number:04}" for number in range(500))
    short = words.shorten(text, 100)
    assert len(short) == 100
    head, tail = short.split(" […] ")
    assert text.startswith(head) and text.endswith(tail)
    assert len(head) > len(tail) > 20
    assert words.shorten("x" * 600) == "x" * 600


def report(**changes: object) -> dict[str, object]:
    paths = {"run": "r", "report": "r/report.html", "model": "models/m", "base": None, "adapter": None, "fused": None}
    sizes = {"base": 4_000_000, "quantized": None, "adapter": 100_000, "fused": 4_200_000}
    return {"base": [], "tuned": [], "fused": [], "paths": {**paths, **changes}, "sizes_bytes": sizes}


def test_chat_command_uses_the_best_there_is() -> None:
    assert words.chat_command(report()) is None
    assert words.chat_command(report(adapter="r/adapter")) == "mlxtune chat --model models/m --adapter-path r/adapter"
    quantized = report(adapter="r/adapter", base="r/base")
    assert words.chat_command(quantized) == "mlxtune chat --model r/base --adapter-path r/adapter"
    assert words.chat_command(report(fused="my run/fused")) == "mlxtune chat --model 'my run/fused'"
    assert words.chat_command(report(adapter="r/adapter", model=None)) is None


def test_size_cells_count_the_adapter_on_its_base() -> None:
    found = report()
    assert words.size_cells(found) == ["4.0 MB", "4.1 MB", "4.2 MB"]
    found["sizes_bytes"]["quantized"] = 1_000_000  # type: ignore[index]
    assert words.size_cells(found) == ["4.0 MB", "1.1 MB", "4.2 MB"]  # base is the original
    found["sizes_bytes"] = dict.fromkeys(("base", "quantized", "adapter", "fused"))
    assert words.size_cells(found) == ["-", "-", "-"]


def test_metrics_come_in_their_order_and_unknown_ones_last() -> None:
    found = report()
    found["tuned"] = [{"metric": name} for name in ("of_mine", "rouge_l", "accuracy", "loss")]
    assert words.metrics(found) == ["loss", "accuracy", "rouge_l", "of_mine"]
    assert (words.metric_name("rouge_l"), words.metric_name("of_mine")) == ("ROUGE-L", "of mine")


def candidate(name: str, **cost: float | None) -> dict[str, object]:
    return {
        "name": name,
        "kind": "untuned",
        "scores": [share(0.5, 0.4, 0.6).to_dict()],
        "difference": None,
        "cost": cost,
    }


def test_a_comparison_has_its_figures_and_says_what_is_not_known() -> None:
    known = candidate("few_shot", prompt_tokens=1212.4, answer_tokens=5.0, seconds_per_row=0.02104, peak_memory_gb=1.5)
    apart = {"value": 0.125, "ci_low": -0.01, "ci_high": 0.26, "p": 0.001, "p_adjusted": 0.0312}
    unknown = {**candidate("endpoint", prompt_tokens=None), "difference": apart}
    found = {"metric": "accuracy", "candidates": [known, unknown]}
    headings, rows = words.comparison_table(found)
    assert headings[:4] == ["", "accuracy", "difference", "p"]
    assert rows == [
        ["few shot", "50 % (40-60)", "-", "-", "1,212", "5", "21 ms", "1.50 GB", "-"],
        ["endpoint", "50 % (40-60)", "+12.5 (-1.0 to +26.0)", "0.031", "-", "-", "-", "-", "-"],
    ]
    assert [row[1:3] for row in words.comparison_table({**found, "metric": None})[1]] == [["-", "-"], ["-", "-"]]
    nats = Score(metric="loss", value=2.0, unit="nats per token", ci_low=1.9, ci_high=2.1, n=9, better="lower")
    assert words.difference_words(apart, nats) == "+0.125 (-0.010 to +0.260)"


def test_a_person_sees_all_rows_where_no_confidence_is_enough() -> None:
    found = {"target": 0.95, "coverage": 0.5, "threshold": 0.8, "precision": 0.96, "n": 96}
    assert words.coverage_words(found) == (
        "Where it is at least 80 % sure, 96 % of its labels are right (wanted: 95 %); that is 50 % of the rows. "
        "The others are for a person."
    )
    assert words.coverage_words({**found, "threshold": None, "coverage": 0.0}).endswith(
        "a person should see every row."
    )


def test_what_fusing_cost_is_told_as_far_as_it_is_known() -> None:
    found = report()
    fuse = {"kept": None, "rows": 63, "layers": 21}
    assert words.fuse_facts({**found, "fuse": None}) == []
    assert words.fuse_facts({**found, "fuse": fuse}) == [
        ("measured on", "63 validation rows"),
        ("size", "base 4.0 MB → fused 4.2 MB"),
    ]
    full = {"kept": 0.91, "base_loss": 4.0, "adapter_loss": 0.5, "fused_loss": 0.8, "kl": 0.01, "same_top": 0.97}
    shown = dict(words.fuse_facts({**found, "fuse": {**fuse, **full, "bits_per_weight": 4.5, "raised": {"a": 8}}}))
    assert shown["share of the gain that is kept"] == "91 %" and shown["layers with more bits"] == "1 of 21"
    assert shown["validation loss, fused"] == "0.800" and shown["bits per weight"] == "4.50"

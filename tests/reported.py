"""A finished run with realistic files, with or without a comparison, which a test may then spoil."""

import functools
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxtune.comparison import contamination, contrast, evidence, forgetting, judge, learning_curve
from mlxtune.comparison.scoring import choices_of
from mlxtune.data import load
from mlxtune.data.labels import label_in
from mlxtune.evaluation import tally
from mlxtune.evaluation.predictions import Prediction
from mlxtune.recipe import CompareRecipe, EvaluateRecipe
from mlxtune.report.decision import decide
from mlxtune.rundir import RunDir
from mlxtune.verification.figures import Verified

ROWS = 96
PATTERN = r"queue: (\w+)"
SETTINGS = EvaluateRecipe(label=PATTERN)
QUEUES = ["billing", "access", "outage", "shipping"]
TICKETS = [
    "I was charged twice for the March invoice, order {n}. Please refund one of them.",
    "The link to reset my password leads to an empty page. My login is user{n}.",
    "Since this morning our dashboard for site {n} shows nothing but <b>502 Bad Gateway</b>.",
    "Parcel {n} says delivered, but nobody here has seen it.",
]


WINDOWS = [
    forgetting.Window(
        tokens=512,
        base_nats=512 * (2.264 + off),
        tuned_nats=512 * (2.711 - off),
        kl=0.31 + off,
        positions=512,
    )
    for off in (-0.03, -0.02, -0.01, 0.0, 0.0, 0.01, 0.02, 0.03)
]


def expected(row: int) -> str:
    return f"queue: {QUEUES[row % 4]}"


def evaluation(answers: list[str], nats: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An evaluation of ROWS rows and its predictions: the answers as given, a loss around `nats` per token."""
    found, predictions = json.loads(_evaluation(tuple(answers), nats))
    return found, predictions


@functools.cache
def _evaluation(answers: tuple[str, ...], nats: float) -> str:
    """Measured once for all tests: intervals take a while."""
    wanted = [expected(row) for row in range(ROWS)]
    made = [
        Prediction(
            where=f"data/test.jsonl:{row + 1}",
            prompt=f"Ticket: {TICKETS[row % 4].format(n=1000 + row)}\nQueue:",
            expected=wanted[row],
            answer=answers[row],
            loss=nats * (0.7 + 0.6 * (row * 37 % ROWS) / ROWS),
            tokens=5,
            exact=answers[row].strip() == wanted[row],
            right=label_in(answers[row], PATTERN) == QUEUES[row % 4],
            label=label_in(answers[row], PATTERN),
            label_expected=QUEUES[row % 4],
            label_scored=label_in(answers[row], PATTERN),
            label_probability=0.5 + 0.49 * (row * 29 % ROWS) / ROWS,
            prompt_tokens=31,
            answer_tokens=5,
            tokens_right=4,
        )
        for row in range(ROWS)
    ]
    scores, tables = tally.tally(tally.Rows(made, SETTINGS))
    cost = {"prompt_tokens": 31.0, "answer_tokens": 5.0, "seconds_per_row": 0.021, "peak_memory_gb": 0.31}
    head = {"model": "models/tiny", "adapter": None, "n": ROWS, "seconds": 2.5}
    found = {**head, "scores": [each.to_dict() for each in scores], "tables": tables, "cost": cost}
    return json.dumps([found, [asdict(each) for each in made]])


def comparison(predictions: dict[str, list[dict[str, Any]]], near: tuple[Any, Any] = ([], [])) -> dict[str, Any]:
    """A comparison of base, examples in the prompt, and the tuned model, by the shape of compare.json.

    `near` are the training and test rows. The learning curve is made up.
    """
    cost = {"answer_tokens": 5.0, "seconds_per_row": 0.021, "peak_memory_gb": 0.31}
    about = {"base": "the question alone", "few_shot": "4 nearest training rows", "tuned": "base with its adapter"}
    apart = contrast.differences(predictions, "few_shot", "accuracy")
    candidates: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": "tuned" if name == "tuned" else "untuned",
            "description": about[name],
            "scores": [each.to_dict() for each in contrast.rescored(lines)],
            "difference": apart[name],
            "cost": {
                **cost,
                "prompt_tokens": 212.0 if name == "few_shot" else 31.0,
                "bytes": 5_830_000 if name == "tuned" else 5_500_000,
            },
        }
        for name, lines in predictions.items()
    ]
    found = forgetting.summed_up(WINDOWS)
    forgotten = {"anchor": "embedded", **found, "budget": 0.1, "choices": None}
    alike = contamination.measured(near[0], near[1], predictions)
    return {
        "rows": ROWS,
        "metric": "accuracy",
        "candidates": candidates,
        "left_out": {"retrieval": "the training rows are too long"},
        "verdict": decide(candidates, "accuracy", forgotten, alike),
        "flips": contrast.flips(predictions["few_shot"], predictions["tuned"], ("few_shot", "tuned"), "accuracy"),
        "flips_since": None,
        "forgetting": forgotten,
        "contamination": alike,
        "judged": None,
        "learning_curve": {
            "metric": "accuracy",
            "points": [
                {"rows": rows, "value": value, "ci_low": value - 0.09, "ci_high": value + 0.07}
                for rows, value in ((192, 0.61), (384, 0.79), (768, 0.917))
            ],
            "fit": {"kind": "power law", "rows": 1536, "value": 0.94, "ci_low": 0.9, "ci_high": 0.97},
            "sentence": "Twice the data would bring about +2.3 points.",
        },
    }


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def put_evaluation(run: RunDir, name: str, answers: list[str], nats: float) -> None:
    found, predictions = evaluation(answers, nats)
    put(run.predictions(name), "".join(f"{json.dumps(each)}\n" for each in predictions))
    put(run.evaluation(name), found)


def wrong_every(step: int) -> list[str]:
    """Answers of which the first and then every `step`-th names another queue."""
    return [expected(row + 1) if row % step == 0 else f" {expected(row)}\n" for row in range(ROWS)]


def data_rows() -> dict[str, list[dict[str, str]]]:
    """Rows of words drawn for each, so that none is near another but the 9th test row, near the 17th training row."""
    draw = random.Random(0)
    found = {
        name: [
            {"prompt": " ".join(f"{draw.getrandbits(40):x}" for _ in range(6)), "completion": expected(row)}
            for row in range(count)
        ]
        for name, count in (("train", 768), ("valid", 96), ("test", ROWS))
    }
    found["test"][8]["prompt"] = f"{found['train'][16]['prompt']} please"
    return found


def make_run(folder: Path) -> RunDir:
    """Writes a finished run below `folder`: base 0 of 96 right, tuned 88, fused 86."""
    run = RunDir(folder / "tickets")
    put(run.recipe, "model: tiny\nseed: 0\ndata:\n  path: tickets\n  test: 0.1\nevaluate:\n  label: 'queue: (\\w+)'\n")
    digests = {"model.safetensors": "3f" * 32, "config.json": "9a" * 32}
    machine = {
        "system": "Darwin 24.5.0",
        "processor": "arm",
        "cores": 10,
        "memory_bytes": 16_000_000_000,
        "device": "metal",
        "device_name": "Apple M2",
        "device_memory_bytes": 11_000_000_000,
        "mlx_version": "0.32.0",
        "blas": "Accelerate",
        "compiler": None,
    }
    origin = {
        "model": {
            "name": "tiny",
            "path": "models/tiny",
            "revision": None,
            "bytes": 5_500_000,
            "sha256": digests,
        },
        "data": {"path": "tickets", "sha256": {"tickets.jsonl": "0c" * 32}},
        "machine": machine,
        "versions": {"python": "3.12.4", "mlxtune": "0.1.0", "mlx": "0.32.0", "mlx_lm": "0.32.2"},
    }
    put(run.origin, origin)
    findings = [
        {
            "kind": "duplicate",
            "severity": "warning",
            "count": 12,
            "where": ["tickets.jsonl:17"],
            "detail": "rows that appear more than once",
            "advice": "they were kept on one side of the split",
        },
        {
            "kind": "email_address",
            "severity": "warning",
            "count": 3,
            "where": ["tickets.jsonl:40"],
            "detail": "rows with an address of a person",
            "advice": "replace it before you share the model",
        },
    ]
    put(run.data / "audit.json", {"files": {"all": "tickets"}, "rows": 960, "findings": findings, "stats": {}})
    for name, rows in data_rows().items():
        put(run.data / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    lines = []
    for step in range(10, 301, 10):
        train = 2.6 * 0.985**step + 0.12 + 0.07 * ((step * 7) % 11 - 5) / 5
        valid = 2.55 * 0.984**step + 0.16 + max(0, step - 210) * 0.0006 if step % 30 == 0 else None
        line = {"step": step, "train_loss": train, "valid_loss": valid, "learning_rate": 2e-4}
        lines.append(json.dumps({**line, "tokens_per_second": 4100.0, "peak_memory_gb": 0.8}))
    put(run.log, "".join(f"{line}\n" for line in lines))
    put(run.adapter / "adapters.safetensors", "a" * 330_000)
    put(run.adapter / "adapter_config.json", {"rank": 16})
    training = {
        "steps": 300,
        "best_step": 210,
        "best_valid_loss": 2.55 * 0.984**210 + 0.16,
        "first_valid_loss": 2.71,
        "seconds": 192.4,
        "trained_tokens": 11_520,
        "rows": 768,
        "epochs": 3.125,
        "tokens_per_second": 4100.0,
        "peak_memory_gb": 0.81,
        "trainable_parameters": 82_432,
        "parameters": 1_375_000,
    }
    put(run.adapter / "training.json", training)
    put_evaluation(run, "base", ["The <script>alert(1)</script> customer\x1b[31m says"] * ROWS, 2.68)
    put_evaluation(run, "tuned", wrong_every(12), 0.25)
    put_evaluation(run, "fused", wrong_every(10), 0.29)
    put(run.fused / "model.safetensors", "m" * 5_500_000)
    put(run.fused / "tokenizer.json", "t" * 9000)
    fuse = {"kept": 0.983, "base_loss": 2.7, "adapter_loss": 0.25, "fused_loss": 0.29, "rows": 96}
    put(run.fused / "fuse.json", {**fuse, "bits": 8, "layers": 28})
    return run


def add_comparison(run: RunDir) -> None:
    """Adds a comparison to a run: its base and tuned model, and examples in the prompt that do half of the rows."""
    lines = {name: run.predictions(name).read_text().splitlines() for name in ("base", "tuned")}
    predictions = {name: [json.loads(line) for line in each] for name, each in lines.items()}
    few = [
        {**each, "prompt_tokens": 212} for each in evaluation([expected(row + row % 2) for row in range(ROWS)], 1.2)[1]
    ]
    ordered = {"base": predictions["base"], "few_shot": few, "tuned": predictions["tuned"]}
    for name, each in ordered.items():
        put(run.compare / f"{name}.jsonl", "".join(f"{json.dumps(line)}\n" for line in each))
    train, test = (load.read_split(run.data, name) for name in ("train", "test"))
    put(run.compare / "compare.json", comparison(ordered, (train, test)))
    evidence.write(evidence.file(run.compare, evidence.FORGETTING), map(asdict, WINDOWS))


def add_evidence(run: RunDir) -> None:
    """Adds to a run's comparison all else that one may hold, with the lines that it is summed from.

    A judge, an earlier run, multiple-choice questions, a learning curve, and the settings.
    """
    path = run.compare / "compare.json"
    value = json.loads(path.read_text())
    ways: list[judge.Verdicts] = [("second", "second"), ("first", "second"), ("first", "first")]
    given = {
        name: [json.loads(line) for line in (run.compare / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "few_shot", "tuned")
    }
    pairs = judge.pairs_of(given["few_shot"], given["tuned"])
    said = [ways[row % 3] for row in range(len(pairs))]
    evidence.write(
        evidence.file(run.compare, evidence.JUDGED),
        [{"where": pair.where, "verdicts": each} for pair, each in zip(pairs, said, strict=True)],
    )
    counts = judge.summed_up(said, 0).to_dict()
    value["judged"] = {"judge": "models/judge", "better": "tuned", "than": "few_shot", **counts}
    chosen = [
        {"where": f"mine.jsonl:{row + 1}", "right": row % 2, "base": 0, "tuned": row % 3 % 2} for row in range(30)
    ]
    evidence.write(evidence.file(run.compare, evidence.CHOICES), chosen)
    value["forgetting"]["choices"] = choices_of("mine.jsonl", chosen)
    earlier = evaluation(wrong_every(3), 0.4)[1][:60]
    evidence.write(evidence.file(run.compare, evidence.SINCE), earlier)
    value["flips_since"] = contrast.flips_since(earlier, given["tuned"], "tuned of march", "accuracy")
    sizes, predicted = [], []
    rows = load.read_split(run.data, "train")
    for percent, places in learning_curve.nested(rows, [25, 50, 100], 0).items():
        sizes.append(len(places))
        predicted.append(evaluation(wrong_every(2 + int(percent) // 10), 50 / percent)[1])
        evidence.write(evidence.curve(run.compare) / evidence.curve_name(percent), predicted[-1])
    value["learning_curve"] = learning_curve.summed_up(sizes, predicted, 0)
    settings = {"choices": "mine.jsonl", "judge": "models/judge"}
    for each in value["candidates"]:
        made = [Prediction(**line) for line in given[each["name"]]]
        each["scores"] = [score.to_dict() for score in tally.tally(tally.Rows(made, SETTINGS))[0]]
    value["verdict"] = decide(value["candidates"], "accuracy", value["forgetting"], value["contamination"])
    value["settings"] = {**asdict(CompareRecipe()), **settings}
    value["evaluate"] = asdict(SETTINGS)
    put(path, value)


KEPT = ("metric", "better", "sha256")


def spoiled(value: Any, text: str) -> Any:
    """A JSON value in which each text is `text`; keys stay, and what the code itself chose."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [spoiled(each, text) for each in value]
    if isinstance(value, dict):
        return {key: each if key in KEPT else spoiled(each, text) for key, each in value.items()}
    return value


def spoil(run: RunDir, text: str) -> None:
    """Puts a text in place of each text in the files of a run."""
    for path in (each for each in run.root.rglob("*.json") if each.name != "tokenizer.json"):
        put(path, spoiled(json.loads(path.read_text()), text))
    for path in [*(run.root / "eval").glob("*.jsonl")]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        put(path, "".join(f"{json.dumps(spoiled(line, text))}\n" for line in lines))
    put(run.recipe, text)


def told(found: Verified) -> set[tuple[str, str]]:
    """The file and key of each difference."""
    return {(each.file, each.key) for each in found.differences}

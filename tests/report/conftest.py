"""Run folders to report on: a finished one with realistic files, which a test may then spoil."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxtune.metrics.accuracy import accuracy
from mlxtune.metrics.exact_match import exact_match
from mlxtune.metrics.loss import loss
from mlxtune.metrics.perplexity import perplexity
from mlxtune.rundir import RunDir

ROWS = 96
QUEUES = ["billing", "access", "outage", "shipping"]
TICKETS = [
    "I was charged twice for the March invoice, order {n}. Please refund one of them.",
    "The link to reset my password leads to an empty page. My login is user{n}.",
    "Since this morning our dashboard for site {n} shows nothing but <b>502 Bad Gateway</b>.",
    "Parcel {n} says delivered, but nobody here has seen it.",
]


def expected(row: int) -> str:
    return f"queue: {QUEUES[row % 4]}"


def evaluation(answers: list[str], nats: float) -> dict[str, Any]:
    """An evaluation file of ROWS rows: the answers as given, each row with a loss around `nats` per token."""
    wanted = [expected(row) for row in range(ROWS)]
    row_nats = [5 * nats * (0.7 + 0.6 * (row * 37 % ROWS) / ROWS) for row in range(ROWS)]
    tokens = [5] * ROWS
    found = [loss(row_nats, tokens), perplexity(row_nats, tokens), exact_match(answers, wanted)]
    found.append(accuracy(answers, wanted, r"queue: (\w+)"))
    predictions = [
        {
            "where": f"data/test.jsonl:{row + 1}",
            "prompt": f"Ticket: {TICKETS[row % 4].format(n=1000 + row)}\nQueue:",
            "expected": wanted[row],
            "answer": answers[row],
            "loss": row_nats[row] / 5,
            "tokens": 5,
            "exact": answers[row].strip() == wanted[row],
        }
        for row in range(ROWS)
    ]
    scores = [each.to_dict() for each in found]
    return {
        "model": "models/tiny",
        "adapter": None,
        "n": ROWS,
        "seconds": 2.5,
        "scores": scores,
        "predictions": predictions,
    }


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def wrong_every(step: int) -> list[str]:
    """Answers of which the first and then every `step`-th names another queue."""
    return [expected(row + 1) if row % step == 0 else f" {expected(row)}\n" for row in range(ROWS)]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[], RunDir]:
    """A function that writes a finished run: base 0 of 96 right, tuned 88, fused 86."""

    def make() -> RunDir:
        run = RunDir(tmp_path / "tickets")
        put(run.recipe, "model: tiny\nseed: 0\ndata:\n  path: tickets\n  test: 0.1\n")
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
        for name, count in (("train", 768), ("valid", 96), ("test", ROWS)):
            put(run.data / f"{name}.jsonl", '{"prompt": "a", "completion": "b"}\n' * count)
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
        put(run.evaluation("base"), evaluation(["The <script>alert(1)</script> customer\x1b[31m says"] * ROWS, 2.68))
        put(run.evaluation("tuned"), evaluation(wrong_every(12), 0.25))
        put(run.evaluation("fused"), evaluation(wrong_every(10), 0.29))
        put(run.fused / "model.safetensors", "m" * 5_500_000)
        put(run.fused / "tokenizer.json", "t" * 9000)
        fuse = {"kept": 0.983, "base_loss": 2.7, "adapter_loss": 0.25, "fused_loss": 0.29, "rows": 96}
        put(run.fused / "fuse.json", {**fuse, "bits": 8, "layers": 28})
        return run

    return make


@pytest.fixture
def run(make_run: Callable[[], RunDir]) -> RunDir:
    return make_run()

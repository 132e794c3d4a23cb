"""A finished run with the files that a card is written from."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxtune.metrics.intervals import share
from mlxtune.metrics.loss import loss
from mlxtune.rundir import RunDir

SHA = {name: f"{number:064x}" for number, name in enumerate(("weights", "config", "data"))}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def scores(right: int, nats: float) -> list[dict[str, Any]]:
    return [each.to_dict() for each in (loss([nats] * 90, [1] * 90), share("accuracy", right, 90))]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base folder in a place that must not be told, with a card of its own."""
    folder = tmp_path / "home of somebody" / "small-base"
    put(folder / "config.json", {})
    put(folder / "README.md", "---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Base\n")
    return folder


@pytest.fixture
def run(tmp_path: Path, base: Path) -> RunDir:
    run = RunDir(tmp_path / "home of somebody" / "runs" / "secret project")
    put(
        run.recipe,
        f"model: '{base}'\nseed: 3\ndata: {{path: '{tmp_path}/rows.jsonl', test: 0.1}}\n"
        f"train: {{epochs: 2.0, optimizer: adamw, anchor: '{tmp_path}/a.txt', report_to: [wandb]}}\n"
        "lora: {targets: [all-linear], rank: 8}\ncompare: {endpoint: 'https://me:token-123@host/v1'}\n",
    )
    model = {"name": str(base), "path": str(base), "revision": None, "bytes": 5_000_000}
    put(
        run.origin,
        {
            "model": {**model, "sha256": {"model.safetensors": SHA["weights"], "config.json": SHA["config"]}},
            "data": {"path": f"{tmp_path}/rows.jsonl", "sha256": {f"{tmp_path}/rows.jsonl": SHA["data"]}},
            "machine": {"device_name": "Apple M2"},
            "versions": {"mlxtune": "0.1.0", "mlx": "0.32.0"},
        },
    )
    row = {"prompt": "Where is my parcel?", "completion": "On its way, dear Mrs Example."}
    for name, count in (("train", 700), ("valid", 80), ("test", 90)):
        put(run.data / f"{name}.jsonl", f"{json.dumps(row)}\n" * count)
    put(run.data / "audit.json", {"rows": 870, "findings": [{"kind": "pii", "count": 7}, {"kind": "leak", "count": 1}]})
    for name, right, nats in (("base", 9, 4.0), ("tuned", 81, 0.5), ("fused", 80, 0.51)):
        put(run.evaluation(name), {"scores": scores(right, nats)})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": ["q"]}}
    put(run.adapter / "adapter_config.json", {**config, "model": str(base)})
    training = {"steps": 300, "best_step": 210, "seconds": 192.4, "trained_tokens": 11_520, "rows": 700}
    put(run.adapter / "training.json", training)
    fuse = {"adapters": {"../adapter": 1.0}, "layers": 21, "bits": 4, "rows": 80}
    losses = {"base_loss": 4.1, "adapter_loss": 0.5, "fused_loss": 0.52, "kept": 0.9944, "kl": 0.002, "same_top": 0.97}
    put(run.fused / "fuse.json", {**fuse, **losses, "bits_per_weight": 4.53, "bytes": 1_600_000})
    return run

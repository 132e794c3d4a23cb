"""One LoRA training in a process of its own, for `bench_train.py`: `trained` starts it, `main` is what runs in it.

    python scripts/train_once.py '{"trainer": "mlx-lm", …}' OUT

A trainer gets a model folder and rows of tokens, through its own entry point and with its own batching. The first
epoch is a warm-up: time and tokens are those of the rest. As every trainer sees each row once an epoch, these are the
same for all, and that is checked. Knows nothing of texts.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIGURES, TIMES = "figures.json", "times"
REPORT_EVERY = 10  # updates, the default of both
NEVER = 1_000_000  # updates
Row = tuple[list[int], int]  # tokens, and how many of them are the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training. `rows` is a JSONL file of rows, a multiple of the batch size.

    float32: mlx-lm's weights are made dense and float32 first. share_prefix: null for the recipe's default.
    compared: each batch is trained on apart, from a fresh model, and the loss of each update is kept; gradients
    aren't clipped and mlx-lm's pad token isn't counted, so that the trainers must agree.
    """

    trainer: str
    model: str
    rows: str
    batch_size: int
    epochs: int
    rank: int
    scale: float
    rate: float
    seed: int = 0
    float32: bool = False
    share_prefix: str | None = None
    compared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured: tokens and seconds after the first epoch; `resident_gb`: the base alone. 1e9 bytes a GB."""

    tokens: int
    seconds: float
    peak_gb: float
    resident_gb: float
    rss_gb: float
    blas: str
    losses: list[float]


@dataclass(slots=True)
class Watch:
    """The time after each update, also written to a file, so that it is known how far a stopped process came.

    `tokens` are the supervised ones of all updates, `losses` in nats per token where a trainer tells each.
    """

    file: Path
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    resident_bytes: int = 0

    def tick(self) -> None:
        self.times.append(time.perf_counter())
        with self.file.open("a") as opened:
            opened.write(f"{self.times[-1]}\n")


def mlxtune(job: Job, rows: list[Row], out: Path, watch: Watch) -> None:
    """`mlxtune.train.train` with the defaults of a recipe but for what a job sets."""
    from mlxtune import machine

    machine.prepare()
    import mlx.core as mx

    from mlxtune import model, recipe
    from mlxtune.data.render import Sample
    from mlxtune.train import train

    settings: dict[str, Any] = {
        "iters": job.epochs * (len(rows) // job.batch_size), "batch_size": job.batch_size, "learning_rate": job.rate,
        "optimizer": "adam", "schedule": "constant", "warmup": 0, "show_answer": False, "save_every": NEVER,
        "report_every": 1 if job.compared else REPORT_EVERY,
    }  # fmt: skip
    settings |= {"max_grad_norm": None} if job.compared else {}
    settings |= {"share_prefix": job.share_prefix} if job.share_prefix is not None else {}
    lora = {"rank": job.rank, "scale": job.scale}
    built = recipe.build({"model": job.model, "seed": job.seed, "lora": lora, "train": settings})
    samples = [
        Sample(f"row {number}", tokens, [place >= prompt for place in range(len(tokens))], prompt, None)
        for number, (tokens, prompt) in enumerate(rows, start=1)
    ]
    lm = model.load(Path(job.model))
    watch.resident_bytes = mx.get_active_memory()

    def on_step(log: Any, _: int) -> None:
        watch.tick()
        watch.losses.append(log.train_loss)

    watch.tokens += train(lm, samples, [], built, out, on_step=on_step).trained_tokens


class _Rows(list[dict[str, Any]]):
    """Rows as mlx-lm's CacheDataset takes them: dicts of two keys, whose `process` gives tokens and offset."""

    def process(self, row: dict[str, Any]) -> Row:
        return row["tokens"], row["offset"]


def mlx_lm(job: Job, rows: list[Row], out: Path, watch: Watch) -> None:
    """`mlx_lm.tuner.trainer.train`, prepared as `mlx_lm lora` prepares it."""
    import mlx.core as mx
    import mlx.optimizers as optimizers
    import numpy as np
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import dequantize_model, load_model

    net, _ = load_model(Path(job.model))
    if job.float32:
        net = dequantize_model(net)
        net.set_dtype(mx.float32)
        mx.eval(net.parameters())
        mx.clear_cache()
    watch.resident_bytes = mx.get_active_memory()
    np.random.seed(job.seed)
    mx.random.seed(job.seed)
    net.freeze()
    linear_to_lora_layers(net, len(net.layers), {"rank": job.rank, "scale": job.scale, "dropout": 0.0})
    updates = job.epochs * (len(rows) // job.batch_size)
    arguments = trainer.TrainingArgs(
        batch_size=job.batch_size,
        iters=updates,
        steps_per_report=1 if job.compared else REPORT_EVERY,
        steps_per_save=NEVER,
        adapter_file=str(out / "adapters.safetensors"),
    )
    used: list[mx.array] = []  # (B, 2): offset and length of each row

    def batches(**options: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for batch, lengths in trainer.iterate_batches(**options):
            used.append(lengths)
            yield batch, lengths
            watch.tick()  # the next batch is asked for

    class Report(trainer.TrainingCallback):
        def on_train_loss_report(self, told: dict[str, Any]) -> None:
            watch.losses.append(told["train_loss"])
            if told["iteration"] == updates:
                watch.tick()

    def without_pad(net: Any, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        return trainer.default_loss(net, batch, lengths - mx.array([0, 1]))

    mx.reset_peak_memory()
    trainer.train(
        net,
        optimizers.Adam(learning_rate=job.rate, bias_correction=True),
        CacheDataset(_Rows({"tokens": tokens, "offset": prompt} for tokens, prompt in rows)),
        args=arguments,
        loss=without_pad if job.compared else trainer.default_loss,
        iterate_batches=batches,
        training_callback=Report(),
    )
    for lengths in used:
        watch.tokens += int((lengths[:, 1] - mx.maximum(lengths[:, 0], 1)).sum())


def unsloth(job: Job, rows: list[Row], out: Path, watch: Watch) -> None:
    """`unsloth_zoo.mlx.trainer.MLXTrainer`, by its documented interface. A quantized base stays so."""
    import mlx.core as mx
    from datasets import Dataset
    from transformers import TrainerCallback
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    dtype = "float32" if job.float32 else None
    net, tokenizer = FastMLXModel.from_pretrained(job.model, load_in_4bit=False, text_only=True, dtype=dtype)
    mx.eval(net.parameters())
    watch.resident_bytes = mx.get_active_memory()
    lora = {"r": job.rank, "lora_alpha": job.scale * job.rank, "random_state": job.seed}
    net = FastMLXModel.get_peft_model(net, **lora, use_gradient_checkpointing=False)
    settings = MLXTrainingConfig(
        max_steps=job.epochs * (len(rows) // job.batch_size), per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1, learning_rate=job.rate, lr_scheduler_type="constant", warmup_steps=0,
        optim="adam", weight_decay=0.0, gradient_checkpointing=False, seed=job.seed, output_dir=str(out),
        logging_steps=1 if job.compared else REPORT_EVERY,
    )  # fmt: skip
    labels = [{"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]} for tokens, prompt in rows]

    class Report(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.tick()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                watch.losses.append(logs["loss"])

    mx.reset_peak_memory()
    trainer = MLXTrainer(net, tokenizer, Dataset.from_list(labels), args=settings, callbacks=[Report()])
    watch.tokens += trainer.train()["trained_tokens"]  # its own count, which has no padding in it


TRAINERS: dict[str, Callable[[Job, list[Row], Path, Watch], None]] = {
    "mlxtune": mlxtune, "mlx-lm": mlx_lm, "unsloth": unsloth,
}  # fmt: skip


def supervised(rows: list[Row]) -> int:
    """Tokens of the answers; the first token of a row has nothing before it and is never one."""
    return sum(len(tokens) - max(prompt, 1) for tokens, prompt in rows)


def common(rows: list[Row]) -> int:
    """Tokens that all rows begin with."""
    return len(os.path.commonprefix([tokens for tokens, _ in rows]))


def random_rows(count: int, vocabulary: int, length: int = 128, answer: int = 13) -> list[Row]:
    draw = random.Random(0)
    return [([draw.randrange(3, vocabulary) for _ in range(length)], length - answer) for _ in range(count)]


def written(folder: Path, rows: list[Row]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[Row]:
    return [(tokens, prompt) for tokens, prompt in map(json.loads, file.read_text().splitlines())]


def measure(job: Job, out: Path) -> Figures:
    rows, watch = read_rows(Path(job.rows)), Watch(out / TIMES)
    size = job.batch_size if job.compared else len(rows)
    for start in range(0, len(rows), size):
        folder = out / f"run-{start}"
        folder.mkdir()
        TRAINERS[job.trainer](job, rows[start : start + size], folder, watch)
    expected = supervised(rows)
    assert watch.tokens == job.epochs * expected, f"{watch.tokens} supervised tokens, not {job.epochs * expected}"

    import mlx.core as mx

    from mlxtune.machine import blas_name

    warmed_up = len(watch.times) // job.epochs
    return Figures(
        tokens=(job.epochs - 1) * expected,
        seconds=watch.times[-1] - watch.times[warmed_up - 1],
        peak_gb=mx.get_peak_memory() / 1e9,
        resident_gb=watch.resident_bytes / 1e9,
        rss_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
        blas=blas_name(),
        losses=watch.losses,
    )


class GaveUp(Exception):
    """A process failed or took too long; says which."""


def timed(
    command: Sequence[object], limit: float, environment: dict[str, str], folder: Path | None = None
) -> tuple[float, str]:
    """Seconds of a process in `folder`, and what it prints; `environment` is added. Raises GaveUp."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    parts = [str(part) for part in command]
    started = time.perf_counter()
    try:
        done = subprocess.run(parts, env=env, cwd=folder, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise GaveUp(f"stopped after {limit:.0f} s") from None
    if done.returncode:
        raise GaveUp(f"failed with {done.returncode}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    return time.perf_counter() - started, done.stdout


def trained(job: Job, python: str, limit: float, environment: dict[str, str]) -> tuple[float, Figures]:
    """Seconds of a process that does `job`, and its figures. Raises GaveUp with the number of updates done."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        try:
            seconds, _ = timed([python, __file__, json.dumps(asdict(job)), out], limit, environment)
        except GaveUp as error:
            done = len((out / TIMES).read_text().splitlines()) if (out / TIMES).exists() else 0
            raise GaveUp(f"{error}; {done} updates done") from None
        return seconds, Figures(**json.loads((out / FIGURES).read_text()))


def main() -> None:
    out = Path(sys.argv[2])
    figures = measure(Job(**json.loads(sys.argv[1])), out)
    (out / FIGURES).write_text(json.dumps(asdict(figures)))


if __name__ == "__main__":
    main()

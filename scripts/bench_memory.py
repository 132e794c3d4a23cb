"""Compares `mlxtune.memory`'s predictions with what MLX says it held: random models, each in a process of its own.

The constants of `mlxtune/memory.py` were chosen on the rows marked `fit`; the others check them. Run it with
`.venv/bin/python scripts/bench_memory.py [NAME ...]`; it takes some minutes.
"""

import importlib
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxtune import machine

machine.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxtune import memory, model  # noqa: E402
from mlxtune.data.render import Sample  # noqa: E402
from mlxtune.recipe import LoraRecipe, Recipe, TrainRecipe  # noqa: E402
from mlxtune.train import train  # noqa: E402

CLOSE, SHARE = 0.2, 0.9  # the aim: within 20 % on 90 % of the configurations
TINY = Path(__file__).parent.parent / "mlxtune" / "assets" / "tiny"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model's shape, rows, and what is set otherwise than by default. `learned`: share of supervised tokens."""

    name: str
    fit: bool = False
    kind: str = "llama"
    width: int
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    length: int
    learned: float = 0.25
    varied: bool = False
    stored: str = "float32"
    bits: int | None = None
    valid: int = 0
    lora: dict[str, Any]
    train: dict[str, Any]


def case(name: str, shape: str, rows: tuple[int, int], lora: dict[str, Any] | None = None, **settings: Any) -> Case:
    """A case; what is no field of it goes to the recipe's section `train`."""
    width, blocks, hidden, heads, kv_heads, vocabulary = SHAPES[shape]
    fields = {key: settings.pop(key) for key in list(settings) if key in Case.__dataclass_fields__}
    return Case(
        name=name, width=width, blocks=blocks, hidden=hidden, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary,
        batch=rows[0], length=rows[1], lora=lora or {}, train=settings, **fields,
    )  # fmt: skip


# width, blocks, hidden of the MLP, heads, key-value heads, vocabulary
SHAPES = {
    "1M": (128, 5, 384, 4, 2, 2048),
    "3M": (192, 6, 512, 6, 6, 2048),
    "8M": (256, 8, 768, 8, 2, 4096),
    "deep": (192, 20, 576, 3, 1, 2048),
    "20M": (384, 8, 1152, 6, 2, 8192),
    "wide": (256, 4, 704, 4, 4, 49152),
    "40M": (512, 8, 1536, 8, 4, 16384),
    "60M": (512, 10, 1536, 8, 8, 32768),
}
CASES = [
    case("1M", "1M", (8, 96), fit=True),
    case("1M long", "1M", (2, 512)),
    case("3M", "3M", (4, 160), fit=True, valid=4),
    case("3M one row", "3M", (1, 384)),
    case("3M checkpoint", "3M", (4, 192), fit=True, grad_checkpoint=True),
    case("3M full", "3M", (4, 128), {"method": "full"}, fit=True),
    case("3M all learned", "3M", (4, 128), learned=1.0),
    case("8M", "8M", (8, 128), {"rank": 8}, valid=8, varied=True),
    case("8M rank 64", "8M", (4, 96), {"rank": 64}, fit=True),
    case("8M rank 128, sgd", "8M", (2, 96), {"rank": 128}, optimizer="sgd"),
    case("8M dora", "8M", (4, 128), {"method": "dora"}, fit=True),
    case("8M attention only", "8M", (4, 192), {"targets": ["attention"]}),
    case("8M last two blocks", "8M", (4, 192), {"num_layers": 2}),
    case("8M full adafactor", "8M", (2, 128), {"method": "full"}, optimizer="adafactor"),
    case("8M accumulated", "8M", (2, 160), grad_accumulation_steps=2, kind="qwen2"),
    case("deep", "deep", (4, 128)),
    case("deep checkpoint", "deep", (4, 256), grad_checkpoint=True),
    case("20M", "20M", (4, 160), fit=True, kind="qwen3"),
    case("20M 4-bit base", "20M", (2, 192), bits=4, stored="bfloat16"),
    case("20M full lion", "20M", (2, 96), {"method": "full"}, optimizer="lion"),
    case("wide vocabulary", "wide", (4, 128), fit=True),
    case("wide, checkpoint, all learned", "wide", (2, 96), fit=True, grad_checkpoint=True, learned=1.0, valid=4),
    case("40M bfloat16", "40M", (4, 96), stored="bfloat16", kind="qwen2"),
    case("40M dora, 8 rows", "40M", (8, 48), {"method": "dora", "rank": 32}),
    case("60M", "60M", (2, 128), kind="qwen2"),
    case("60M full sgd", "60M", (2, 48), {"method": "full"}, optimizer="sgd"),
]  # fmt: skip


def write_model(case: Case, out: Path) -> None:
    """A random model of the case's shape, with the embedded tokenizer."""
    architecture = importlib.import_module(f"mlx_lm.models.{case.kind}")
    config = {
        "model_type": case.kind, "hidden_size": case.width, "num_hidden_layers": case.blocks,
        "intermediate_size": case.hidden, "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads,
        "head_dim": case.width // case.heads, "vocab_size": case.vocabulary, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": case.kind != "qwen2",
    }  # fmt: skip
    mx.random.seed(0)
    net = architecture.Model(architecture.ModelArgs.from_dict(config))
    net.set_dtype(getattr(mx, case.stored))
    if case.bits is not None:
        nn.quantize(net, 64, case.bits)
        config["quantization"] = {"group_size": 64, "bits": case.bits, "mode": "affine"}
    out.mkdir()
    model.save(out, net, config, TINY)


def samples(case: Case, count: int) -> list[Sample]:
    draw = random.Random(count)
    made = []
    for number in range(count):
        length = case.length if number == 0 or not case.varied else draw.randint(case.length // 4, case.length)
        learned = max(1, int(length * case.learned))
        tokens = [draw.randrange(3, 900) for _ in range(length)]
        trained = [place >= length - learned for place in range(length)]
        made.append(Sample(f"rows:{number}", tokens, trained, length - learned, None))
    return made


def recipe(case: Case) -> Recipe:
    settings = {"iters": 3, "eval_every": 1, "show_answer": False, "batch_size": case.batch} | case.train
    return Recipe(lora=LoraRecipe(**case.lora), train=TrainRecipe(**settings))


def measured(case: Case) -> dict[str, Any]:
    """Predicts and trains, in this process: MLX's peaks in bytes beside the predicted ones."""
    asked = recipe(case)
    machine.configure(save_memory=asked.train.grad_checkpoint)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as scratch:
        subprocess.run([sys.executable, __file__, "--write", case.name, f"{scratch}/model"], check=True)
        train_rows = samples(case, 2 * case.batch * asked.train.grad_accumulation_steps)
        valid_rows = samples(case, case.valid)
        net, config = model.outline(Path(scratch) / "model")
        peak = memory.Job.here(net, config, memory.Rows.of([*train_rows, *valid_rows])).peak(asked)
        del net
        mx.reset_peak_memory()
        lm = model.load(Path(scratch) / "model")
        loading = mx.get_peak_memory()
        done = train(lm, train_rows, valid_rows, asked, Path(scratch) / "run")
        return {
            "parameters": done.parameters, "loading": loading, "training": mx.get_peak_memory(),
            "predicted": asdict(peak) | {"training": peak.training, "total": peak.total}, "seconds": done.seconds,
        }  # fmt: skip


def main(args: list[str]) -> None:
    by_name = {each.name: each for each in CASES}
    if args[:1] == ["--write"]:
        write_model(by_name[args[1]], Path(args[2]))
        return
    if args[:1] == ["--one"]:
        print(json.dumps(measured(by_name[args[1]])))
        return
    print(f"{'':31}{'':5}{'million':>8}{'predicted':>10}{'measured':>9}{'ratio':>7}{'loading':>9}")
    close = []
    for name in args or list(by_name):
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        said, seen = found["predicted"]["training"], found["training"]
        loading = found["predicted"]["loading"] / found["loading"]
        close.append(abs(said / seen - 1) <= CLOSE)
        print(
            f"{name:31}{'fit' if by_name[name].fit else '':5}{found['parameters'] / 1e6:8.1f}{said / 1e6:8.0f} MB"
            f"{seen / 1e6:6.0f} MB{said / seen:7.2f}{loading:9.2f}",
            flush=True,
        )
    print(f"{sum(close)} of {len(close)} within {CLOSE:.0%}; the aim is {SHARE:.0%}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What fusing into a 4-bit base loses and takes, mlxtune beside mlx-lm at equal bits.

    python scripts/bench_fuse.py [--json] [--hidden 768]

Loss: on the embedded model in 4 bits, three adapters of small, middle and large change (8, 60 and 300 updates on the
embedded tickets, seed 0). Each is fused by `mlx_lm fuse` and by `mlxtune fuse`, which sees the training rows and may
give no layer more bits; then again into the original weights (--base). Shown is the mean KL(adapter || fused) in nats
over the supervised tokens of test rows, which neither saw, and the share of the gain in loss that is kept.

Memory: a random Llama model of the given width in bfloat16, and in 4 bits, with an adapter on every layer. Each fuse
runs in a process of its own: MLX's peak, and how far the peak of the resident memory lies above what the process held
before it began, both as multiples of the larger of input and output. mlxtune fuses without rows here; with --rows also
with some, on which it fits and measures, and then holds what an evaluation holds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlxtune import machine

machine.prepare()

import mlx.core as mx  # noqa: E402

from mlxtune import adapter, hub, likelihood, model, pipeline, recipe
from mlxtune.convert import convert  # noqa: E402
from mlxtune.data import load  # noqa: E402
from mlxtune.data.render import Limit, Sample, render  # noqa: E402
from mlxtune.fusing import blend, survival
from mlxtune.fusing.blend import Part  # noqa: E402
from mlxtune.model import LanguageModel  # noqa: E402
from mlxtune.recipe import LoraRecipe, QuantizeRecipe  # noqa: E402
from mlxtune.rundir import RunDir  # noqa: E402
from mlxtune.tokenizer import inner, load_for_rows  # noqa: E402

UPDATES = {"small": 8, "middle": 60, "large": 300}
RATE = 2e-3
MEMORY_ROWS = 4
WORKER = """
import json, sys, time
kind, base, tuned, out, rows = sys.argv[1:]
from mlxtune import machine
machine.prepare()
import mlx.core as mx
if kind == "mlx_lm":
    import mlx_lm.fuse
    sys.argv = ["fuse", "--model", base, "--adapter-path", tuned, "--save-path", out]
    run = mlx_lm.fuse.main
else:
    from pathlib import Path
    from mlxtune.data.render import Sample
    from mlxtune.fuse import fuse
    from mlxtune.recipe import FuseRecipe
    given = [Sample("x", list(range(3, 35)), [False] * 16 + [True] * 16, 16, None)] * int(rows)
    run = lambda: fuse(Path(base), Path(tuned), Path(out), FuseRecipe(accept_loss=True, aim=0), given, given)
def held(name):  # not getrusage's peak, which begins with that of the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024
before = held("VmRSS")
started = time.perf_counter()
run()
print(json.dumps({
    "seconds": time.perf_counter() - started, "mlx_peak": mx.get_peak_memory(),
    "rss_above": held("VmHWM") - before,
}))
"""


def measured(*args: object) -> dict[str, Any]:
    """What a fuse in a process of its own takes."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *map(str, args)], capture_output=True, text=True, env=os.environ, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(base: Path, run: Path, split: str) -> list[Sample]:
    made = recipe.load(RunDir(run).recipe)
    config = model.check(base)
    tokenizer, _ = load_for_rows(base, config, adapter.check(run / "adapter").get("chat_template"))
    rows = load.read_split(RunDir(run).data, split)
    limit = Limit.of(made.train.max_seq_length, model.context_length(config))
    return render(rows, inner(tokenizer), tokenizer.eos_token_ids, made.data, limit).samples


def losses(folder: Path) -> list[dict[str, Any]]:
    """Each adapter fused by each way."""
    tiny, base = hub.fetch("tiny", None), folder / "base"
    convert(tiny, base, quantize=QuantizeRecipe(bits=4, method="rtn"))
    found = []
    for name, updates in UPDATES.items():
        run = folder / name
        asked = recipe.build(
            {"model": str(base), "data": {"path": "tickets"}, "train": {"iters": updates, "learning_rate": RATE}}
        )
        pipeline.run(asked, run, stages=pipeline.TRAIN_STAGES)
        test = rows_of(base, run, "test")
        lm = model.load(base)
        base_loss = likelihood.mean_nats(lm.net, test)
        blend.attach(lm, [Part(run / "adapter")])
        tuned_loss = likelihood.mean_nats(lm.net, test)
        with tempfile.TemporaryFile() as memory:
            survival.remember(lm.net, test, memory)
            del lm
            for way, made in ways(base, tiny, run, folder):
                net = model.load(made).net
                survived = survival.compare(net, test, memory)
                kept = survival.kept_share(base_loss, tuned_loss, likelihood.mean_nats(net, test))
                size = sum(file.stat().st_size for file in model.weight_files(made))
                found.append(
                    {"adapter": name, "way": way, "kl": survived.kl, "same_top": survived.same_top, "kept": kept,
                     "rows": len(test), "bytes": size}
                )  # fmt: skip
                shutil.rmtree(made)
    return found


def ways(base: Path, tiny: Path, run: Path, folder: Path) -> Any:
    """Each way to fuse by its name, with the folder that it made."""
    out = folder / "fused"
    plain = ["--model", str(base), "--adapter-path", str(run / "adapter"), "--save-path", str(out)]
    own = [*plain, "--accept-loss", "--max-bpw", "1"]
    for way, command in (
        ("mlx-lm", ["mlx_lm", "fuse", *plain]),
        ("mlxtune", ["mlxtune", "fuse", *own]),
        ("mlxtune --base", ["mlxtune", "fuse", *own, "--base", str(tiny)]),
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        yield way, out


def random_model(folder: Path, hidden: int) -> None:
    """A Llama model of 24 blocks with random weights in bfloat16, and the embedded model's tokenizer."""
    tiny = hub.fetch("tiny", None)
    net, config = model.outline(tiny)
    config = config | {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 24, "head_dim": 64,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 256, "torch_dtype": "bfloat16",
    }  # fmt: skip
    kind = sys.modules[type(net).__module__]
    made = kind.Model(kind.ModelArgs.from_dict(config))
    made.set_dtype(mx.bfloat16)
    folder.mkdir()
    model.save(folder, made, config, tiny)


def random_adapter(base: Path, folder: Path) -> None:
    net, config = model.outline(base)
    lm = LanguageModel(net=net, tokenizer=None, config=config, path=base)  # type: ignore[arg-type]
    asked = LoraRecipe(rank=8)
    keys = adapter.attach(lm, asked, seed=0)
    for _, layer in adapter.adapted_layers(lm.net):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=1e-3)
    folder.mkdir()
    adapter.save(folder, adapter.trained(lm.net), adapter.config(lm, asked, keys))


def peaks(folder: Path, hidden: int, rows: bool) -> list[dict[str, Any]]:
    """What each fuse takes beside the larger of its input and output."""
    dense, packed = folder / "dense", folder / "packed"
    random_model(dense, hidden)
    convert(dense, packed, quantize=QuantizeRecipe(bits=4, method="rtn"))
    found = []
    for base in (dense, packed):
        random_adapter(base, folder / f"{base.name}-adapter")
        ways = [("mlx_lm", 0), ("mlxtune", 0), ("mlxtune", MEMORY_ROWS)]
        for kind, count in ways if rows and base is packed else ways[:2]:
            out = folder / "out"
            taken = measured(kind, base, folder / f"{base.name}-adapter", out, count)
            sizes = [sum(file.stat().st_size for file in model.weight_files(each)) for each in (base, out)]
            shutil.rmtree(out)
            name = kind.replace("_", "-") + (" with rows" if count else "")
            found.append(
                {"base": base.name, "way": name, "bytes": max(sizes), "mlx_peak": taken["mlx_peak"] / max(sizes),
                 "rss_above": taken["rss_above"] / max(sizes), "seconds": taken["seconds"]}
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--hidden", type=int, default=768, help="width of the random model, a multiple of 256")
    parser.add_argument("--only", choices=("loss", "memory"), help="half of it")
    parser.add_argument("--rows", action="store_true", help="also the memory with rows, which takes minutes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-fuse-") as scratch:
        folder = Path(scratch)
        lost = losses(folder) if given.only != "memory" else []
        taken = peaks(folder, given.hidden, given.rows) if given.only != "loss" else []
    if given.json:
        print(json.dumps({"loss": lost, "memory": taken}, indent=1))  # noqa: T201
        return
    lines = []
    for name in UPDATES:
        some = {each["way"]: each for each in lost if each["adapter"] == name}
        for way, each in some.items():
            ratio = each["kl"] / some["mlx-lm"]["kl"]
            lines.append(
                f"{name:7} {way:15} KL {each['kl']:.5f}  {ratio:5.2f} x  same top {each['same_top']:6.1%}  "
                f"kept {each['kept']:7.2%}  {each['bytes']:,} bytes"
            )
    for each in taken:
        lines.append(
            f"{each['base']:7} {each['way']:18} {each['bytes'] / 1e6:6.0f} MB  MLX peak {each['mlx_peak']:5.2f} x  "
            f"resident {each['rss_above']:5.2f} x  {each['seconds']:5.1f} s"
        )
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()

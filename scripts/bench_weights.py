"""Compares `mlxtune convert -q` with mlx-lm's: time, memory and size, whole commands, each in a process of its own.

The models: the embedded one, stories260K where it lies beside the checkout, and random Llamas of 0.2 and 0.6 GB in
bfloat16, which are written to a temporary folder. Medians over turns; the two take turns. Every output goes through
`mlx_lm.load`, and one forward pass is compared: rounding to nearest with mlx-lm's own output, the rest with the same
folder's weights expanded to float32. Run it with `.venv/bin/python scripts/bench_weights.py [TURNS]`; three turns take
about five minutes on two cores. It needs 1.5 GB of disk.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# this process loads no MLX: the memory of a process that starts another counts in the other's peak
ROOT = Path(__file__).parent.parent
TINY = ROOT / "mlxtune" / "assets" / "tiny"
STORIES = ROOT.parent / "shared" / "assets" / "models" / "stories260K"
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCKS = {"0.2 GB": 6, "0.6 GB": 23}
OURS, THEIRS = ("rtn", "default"), "mlx-lm"
TOKENS = [[1, 40, 300, 7, 200, 12, 2]]
# of the issue: peak memory and time as shares of mlx-lm's, and the peak at 0.6 GB as a share of that at 0.2 GB
PEAK, TIME, GROWTH = 0.5, 0.8, 1.15


def write_random(folder: Path, blocks: int) -> None:
    """A random Llama with so many blocks, tensor by tensor."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    from mlxtune import shards

    config = {**LLAMA, "num_hidden_layers": blocks}
    net = llama.Model(llama.ModelArgs.from_dict(config))
    sizes = {name: tuple(weight.shape) for name, weight in tree_flatten(net.parameters())}
    keys = mx.random.split(mx.random.key(0), len(sizes))

    def drawn(shape: tuple[int, ...], key: mx.array) -> mx.array:
        weight = mx.random.normal(shape, key=key) * shape[-1] ** -0.5 if len(shape) > 1 else mx.ones(shape)
        return weight.astype(mx.bfloat16)

    folder.mkdir()
    pieces = (shards.of_array(name, drawn(shape, key)) for (name, shape), key in zip(sizes.items(), keys, strict=True))
    shards.write(folder, pieces)
    shards.describe(folder, config, TINY)


def convert(tool: str, task: str, source: str, out: str) -> dict[str, Any]:
    """Runs the command in this process; returns its peaks in bytes."""
    dequantizes = task == "dequantize"
    if tool == THEIRS:
        from mlx_lm.convert import main

        flags = ["--dequantize"] if dequantizes else ["-q", "--q-bits", "4"]
        sys.argv = ["mlx_lm.convert", "--hf-path", source, "--mlx-path", out, *flags]
        main()
    else:
        from mlxtune import cli

        method = ["--q-method", tool] if tool != "default" else []
        flags = ["dequantize"] if dequantizes else ["convert", "-q", "--q-bits", "4", *method]
        try:
            cli.main([flags[0], source, "--mlx-path", out, *flags[1:]])
        except SystemExit as end:
            if end.code:
                raise
    import mlx.core as mx

    unit = 1 if sys.platform == "darwin" else 1024
    return {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "mlx": mx.get_peak_memory()}


def look(folder: str, other: str) -> dict[str, Any]:
    """Bits per weight of a converted model, and how far its logits are from those it should have."""
    from mlxtune import machine

    machine.prepare()
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten

    from mlxtune import model, precision

    tokens = mx.array(TOKENS)
    net, _ = mlx_lm.load(folder)
    stored = sum(weight.nbytes for _, weight in tree_flatten(net.parameters()))
    bits = 8 * stored / precision.parameter_count(net)
    if other:
        expected, _ = mlx_lm.load(other)
    else:
        net.set_dtype(mx.float32)
        expected = model.load(Path(folder)).net
        expected.set_dtype(mx.float32)
    wanted = expected(tokens).astype(mx.float32)
    far = mx.abs(net(tokens).astype(mx.float32) - wanted).max() / mx.abs(wanted).max()
    return {"bits": bits, "far": far.item()}


def child(*args: str) -> tuple[dict[str, Any], dict[str, float]]:
    """What this script prints as another process, and how long that took, on the clock and of all cores."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(args)}: {done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]), {"seconds": seconds, "cpu": cpu}


def measured(source: Path, turns: int, scratch: Path) -> dict[tuple[str, str], dict[str, float]]:
    """By task and tool: medians over the turns, and what `look` says of the last output."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    looks: dict[tuple[str, str], dict[str, float]] = {}
    for turn in range(turns):
        for tool in (THEIRS, *OURS) if turn % 2 == 0 else (*OURS, THEIRS):
            for task in ("quantize", "dequantize") if tool in (THEIRS, "rtn") else ("quantize",):
                folder = scratch / f"{tool}-{task}"
                shutil.rmtree(folder, ignore_errors=True)
                start = source if task == "quantize" else scratch / f"{tool}-quantize"
                found, spent = child("--convert", tool, task, str(start), str(folder))
                runs.setdefault((task, tool), []).append(found | spent)
    for task, tool in runs:
        same = scratch / f"{THEIRS}-{task}" if tool == "rtn" and task == "quantize" else ""
        looks[task, tool], _ = child("--look", str(scratch / f"{tool}-{task}"), str(same))
    return {
        key: {name: statistics.median(each[name] for each in found) for name in found[0]} | looks[key]
        for key, found in runs.items()
    }


def show(name: str, found: dict[tuple[str, str], dict[str, float]]) -> None:
    for (task, tool), each in found.items():
        theirs = found[task, THEIRS]
        parts = ("seconds", "cpu", "rss", "mlx") if tool != THEIRS else ()
        print(
            f"{name:12}{task:11}{tool:8}{each['seconds']:7.2f} s{each['cpu']:7.2f} s{each['rss'] / 1e6:6.0f} MB"
            f"{each['mlx'] / 1e6:6.0f} MB{each['bits']:8.3f}{each['far']:9.1e}   "
            + "".join(f"{each[part] / theirs[part]:6.2f}" for part in parts),
            flush=True,
        )


def judge(found: dict[str, dict[tuple[str, str], dict[str, float]]]) -> None:
    """The aims, and what was reached."""
    for name in BLOCKS:
        theirs = found[name]["quantize", THEIRS]
        for tool in OURS:
            ours = found[name]["quantize", tool]
            peak, spent = ours["rss"] / theirs["rss"], ours["seconds"] / theirs["seconds"]
            print(
                f"{name}, {tool}: peak {peak:.2f} of mlx-lm's, aim {PEAK}: {'yes' if peak <= PEAK else 'NO'}; "
                f"time {spent:.2f}, aim {TIME}: {'yes' if spent <= TIME else 'NO'}"
            )
    for tool in (THEIRS, *OURS):
        small, large = (found[name]["quantize", tool]["rss"] for name in BLOCKS)
        reached = "" if tool == THEIRS else f", aim {GROWTH}: {'yes' if large / small <= GROWTH else 'NO'}"
        print(f"{tool}: peak at 0.6 GB {large / small:.2f} of that at 0.2 GB{reached}")


def main(args: list[str]) -> None:
    if args[:1] == ["--convert"]:
        print(json.dumps(convert(*args[1:])))
        return
    if args[:1] == ["--look"]:
        print(json.dumps(look(*args[1:])))
        return
    if args[:1] == ["--write"]:
        write_random(Path(args[1]), int(args[2]))
        print("{}")
        return
    turns = int(args[0]) if args else 3
    print(
        f"{'':31}{'time':>9}{'CPU':>9}{'peak':>9}{'MLX':>9}{'bits':>8}{'logits':>9}   "
        f"{'time':>6}{'CPU':>6}{'peak':>6}{'MLX':>6}  of mlx-lm's"
    )
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as made:
        sources = {"embedded": TINY} | ({"stories260K": STORIES} if STORIES.is_dir() else {})
        for name in (*sources, *BLOCKS):
            folder = Path(made) / "model"
            if name in BLOCKS:
                child("--write", str(folder), str(BLOCKS[name]))
            found[name] = measured(sources.get(name, folder), turns, Path(made))
            show(name, found[name])
            for each in Path(made).iterdir():
                shutil.rmtree(each)
    judge(found)


if __name__ == "__main__":
    main(sys.argv[1:])

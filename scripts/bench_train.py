"""Speed and memory of LoRA training, mlxtune and mlx-lm's own trainer side by side in one run.

    python scripts/bench_train.py --model MODEL_FOLDER --data FOLDER_OF_DATA_SETS [--workloads short …] [--json]

Each measurement is a process of its own (`train_once.py`) and the contenders take turns. Shown are medians over
--repeats turns and, beside those of the others, the first one's share: its figure by theirs, the median over the turns.
All train on the same rows with the same seed, rank, batch size, optimizer (Adam) and number of updates, with adapters
on all linear layers of all blocks; batching is each trainer's own. tokens/s are supervised tokens per second of the
updates after the first epoch, counted from the rows that were used: mlx-lm's own figure has a token of padding in it
for each row. `process` is a whole process's time, start, loading and warm-up included; `peak` is MLX's from the first
update on, RSS the process's. mlxtune clips gradients, as is its default, and the others don't.

mlx-lm runs in two ways. "same BLAS, float32": with the OpenBLAS that mlxtune loads by itself, no `mx.compile`, and
dense float32 weights. "default install": as it comes, with the reference BLAS, weights as stored, and `mx.compile`,
which on a Linux CPU calls g++ for each new kernel; those made in one turn are there in the next. A process that takes
longer than --limit is stopped and its contender left out from then on. --unsloth-python names a Python that has
`unsloth_zoo[mlx]` and `mlx[cpu]`: Unsloth's MLX trainer then runs in both ways too, but leaves a quantized base so.

Workloads, whose random models have mlx-lm's Llama architecture. A turn of all but the last takes some 20 minutes on two
idle cores, nearly all of it mlx-lm's default install: 3 to 5 each.
  short       banking77 (a question -> one of four intents), batch 8, on --model. Also each batch's loss from a fresh
              model, where the trainers must agree, and the whole command for 100 updates of `mlxtune train` and
              `mlx_lm lora --train`
  long        gsm8k (a question -> its worked answer), batch 4, on --model; rows of at most 512 tokens
  quantized   short's rows, batch 4, on a random base of 26 M parameters in 4 bits with float32 scales
  quantized16 the same with bfloat16 scales, as most published bases have; 4 rows, their last 32 tokens
  vocabulary  random rows of 128 tokens, 13 of them supervised, batch 4, on a random model of 40 M parameters with a
              vocabulary of 131,072. Also the memory of the loss block alone (head, loss, gradient down to the hidden
              states): the peak above the weights in a model of one thin block and that vocabulary, less the same with
              a vocabulary of 512
  prefix      short's rows behind a common system prompt at least three times as long as the rest of any row, batch 8,
              on a random model of 26 M parameters, with mlxtune's shared prefix and without
  workers     (only where named) `mlxtune train` on that model: two local workers, one process with all cores or one
"""

import argparse
import contextlib
import ctypes.util
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_chain import RANK, RATE, SCALE, mlx_lm_chain, mlxtune_chain, prepare, tokens_per_second
from bench_quality import banking77, gsm8k, with_template
from train_once import GaveUp, Job, Row, common, random_rows, read_rows, supervised, timed, trained, written

from mlxtune import machine
from mlxtune.recipe import all_settings

import mlx.core as mx  # isort: skip
from mlx_lm.models import llama  # isort: skip
from mlx_lm.tuner.datasets import CompletionsDataset  # isort: skip
from mlx_lm.utils import load_tokenizer, quantize_model, save_config, save_model  # isort: skip

VOCABULARY = 131_072
BODY = {"hidden": 512, "blocks": 8, "inner": 1408, "heads": 8}  # 26 M parameters
SHARED_PREFIX = "train.share_prefix"
SYSTEM = (
    "You sort the questions that customers of a bank write to its support. Answer with the name of one category and "
    "nothing else, in small letters, with underscores between the words. card_arrival is for a card that was ordered "
    "and has not come, or whose way is asked for. exchange_rate is for what one currency costs in another and when. "
    "top_up_failed is for money that was sent to the account and did not get there or was sent back. "
    "verify_my_identity is for papers, photos and proofs of who the customer is, and for what they are needed. If two "
    "of them fit, take the one that the customer asks about first, and never ask back."
)
Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Who trains, and how; `environment` is added to that of the process."""

    name: str
    trainer: str
    environment: dict[str, str]
    python: str = sys.executable
    float32: bool = False
    share_prefix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model and rows to train it on; the first of the `epochs` is the warm-up."""

    model: Path
    rows: Path
    batch_size: int
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all measurements share: --model with a chat template, the data, where to write, and the options."""

    base: Path
    data: Path
    work: Path
    limit: float
    repeats: int
    unsloth: str | None

    def folder(self, name: str) -> Path:
        (self.work / name).mkdir()
        return self.work / name


@dataclass(slots=True)
class Outcome:
    """The figures of a contender's turns, and why it was left out from some turn on."""

    runs: list[Figures]
    gave_up: str | None = None


def short(bench: Bench, out: Path) -> Workload:
    rows = text_rows(bench, banking77(bench.data / "banking77", "train"))
    return Workload(model=bench.base, rows=written(out, rows[:320]), batch_size=8, epochs=4)


def long(bench: Bench, out: Path) -> Workload:
    rows = [row for row in text_rows(bench, gsm8k(bench.data / "gsm8k", "train")) if len(row[0]) <= 512]
    return Workload(model=bench.base, rows=written(out, rows[:80]), batch_size=4, epochs=3)


def quantized(bench: Bench, out: Path) -> Workload:
    rows = written(out, text_rows(bench, banking77(bench.data / "banking77", "train"))[:8])
    return Workload(model=random_model(bench, out / "base", bits=4, **BODY), rows=rows, batch_size=4, epochs=2)


def quantized16(bench: Bench, out: Path) -> Workload:
    rows = text_rows(bench, banking77(bench.data / "banking77", "train"))[:4]
    rows = [(tokens[-32:], prompt - max(0, len(tokens) - 32)) for tokens, prompt in rows]
    base = random_model(bench, out / "base", bits=4, dtype=mx.bfloat16, **BODY)
    return Workload(model=base, rows=written(out, rows), batch_size=4, epochs=3)


def vocabulary(bench: Bench, out: Path) -> Workload:
    base = random_model(bench, out / "base", vocabulary=VOCABULARY, hidden=256, blocks=8, inner=768, heads=4)
    return Workload(model=base, rows=written(out, random_rows(12, VOCABULARY)), batch_size=4, epochs=3)


def prefix(bench: Bench, out: Path) -> Workload:
    pairs = banking77(bench.data / "banking77", "train")
    rows = text_rows(bench, ({**pair, "prompt": f"{SYSTEM}\n{pair['prompt']}"} for pair in pairs))
    longest = common(rows) * 4 // 3
    rows = written(out, [row for row in rows if len(row[0]) <= longest][:16])
    return Workload(model=random_model(bench, out / "base", **BODY), rows=rows, batch_size=8, epochs=2)


MAKERS: tuple[Callable[[Bench, Path], Workload], ...] = (short, long, quantized, quantized16, vocabulary, prefix)
WORKLOADS = {each.__name__: each for each in MAKERS}


def text_rows(bench: Bench, pairs: Iterable[dict[str, str]]) -> list[Row]:
    """Rows as mlx-lm makes them of prompts and completions, in a fixed random order."""
    reader = CompletionsDataset([], load_tokenizer(bench.base), "prompt", "completion", mask_prompt=True)
    rows = [reader.process(pair) for pair in pairs]
    random.Random(0).shuffle(rows)
    return rows


def random_model(
    bench: Bench, out: Path, *, hidden: int, blocks: int, inner: int, heads: int, vocabulary: int = 512, bits: int = 0,
    dtype: mx.Dtype = mx.float32,
) -> Path:  # fmt: skip
    """A folder of random weights with --model's tokenizer, quantized where `bits` are given."""
    shutil.copytree(bench.base, out, ignore=shutil.ignore_patterns("model*.safetensors*"))
    config = json.loads((out / "config.json").read_text()) | {
        "hidden_size": hidden, "num_hidden_layers": blocks, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": hidden // heads, "vocab_size": vocabulary,
    }  # fmt: skip
    mx.random.seed(0)
    net = llama.Model(llama.ModelArgs.from_dict(config))
    net.set_dtype(dtype)
    if bits:
        with contextlib.redirect_stdout(sys.stderr):
            net, config = quantize_model(net, config, group_size=64, bits=bits)
    save_model(out, net)
    save_config(config, out / "config.json")
    return out


def ways(bench: Bench, name: str, trainer: str) -> list[Contender]:
    """A peer's two ways to run: as mlxtune does on this machine, and as it comes."""
    openblas = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    same = {"MLX_DISABLE_COMPILE": "1"} | ({"LD_PRELOAD": openblas} if openblas else {})
    (bench.work / "kernels").mkdir(exist_ok=True)
    plain = {"TMPDIR": str(bench.work / "kernels")}  # where MLX keeps what g++ made: nothing of another run
    return [
        Contender(name=f"{name}, same BLAS, float32", trainer=trainer, environment=same, float32=True),
        Contender(name=f"{name}, default install", trainer=trainer, environment=plain),
    ]


def contenders(bench: Bench) -> list[Contender]:
    """mlxtune first, then each peer in its two ways."""
    found = [Contender(name="mlxtune", trainer="mlxtune", environment={}), *ways(bench, "mlx-lm", "mlx-lm")]
    if bench.unsloth is not None:
        # its Python needs mlxtune too, which tells the BLAS
        more = {"UNSLOTH_ZOO_DISABLE_GPU_INIT": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        found += [
            replace(each, python=bench.unsloth, environment=each.environment | more)
            for each in ways(bench, "Unsloth", "unsloth")
        ]
    return found


def one_training(contender: Contender, workload: Workload, bench: Bench, compared: bool = False) -> dict[str, Any]:
    """What `train_once` measured, and the process's seconds. Raises GaveUp."""
    job = Job(
        trainer=contender.trainer, model=str(workload.model), rows=str(workload.rows), batch_size=workload.batch_size,
        epochs=workload.epochs, rank=RANK, scale=SCALE, rate=RATE, float32=contender.float32,
        share_prefix=contender.share_prefix, compared=compared,
    )  # fmt: skip
    seconds, figures = trained(job, contender.python, bench.limit, contender.environment)
    if "LD_PRELOAD" in contender.environment and figures.blas == machine.REFERENCE_BLAS:
        raise GaveUp("it did not load OpenBLAS")
    return asdict(figures) | {"process": seconds}


def speed(contender: Contender, workload: Workload, bench: Bench) -> Figures:
    found = one_training(contender, workload, bench)
    shown = {"process s": found["process"], "peak GB": found["peak_gb"], "RSS GB": found["rss_gb"]}
    return {"tokens/s": found["tokens"] / found["seconds"]} | shown


def take_turns(what: str, actions: dict[str, Callable[[], Figures]], repeats: int) -> dict[str, Outcome]:
    """The outcome of each action; they are done one after the other, `repeats` times. The first must not give up."""
    outcomes = {name: Outcome([]) for name in actions}
    for turn, (name, action) in itertools.product(range(1, repeats + 1), actions.items()):
        outcome = outcomes[name]
        if outcome.gave_up is not None:
            continue
        try:
            outcome.runs.append(action())
            told = ", ".join(f"{figure} {value:.4g}" for figure, value in outcome.runs[-1].items())
        except GaveUp as error:
            outcome.gave_up = told = str(error)
        print(f"{what}, turn {turn}: {name}: {told}", file=sys.stderr)
        if outcome.gave_up is not None and name == next(iter(actions)):
            sys.exit(1)
    return outcomes


def measured(name: str, bench: Bench) -> dict[str, dict[str, Outcome]]:
    """The outcomes of a workload's measurements, each by what it is."""
    if name == "workers":
        return {"workers: 20 updates of batch 8 by `mlxtune train`": workers(bench)}
    workload, all_of_them = WORKLOADS[name](bench, bench.folder(name)), contenders(bench)
    title = f"{name}: {described(workload)}"
    if name == "prefix" and SHARED_PREFIX in all_settings():
        ours, *others = all_of_them
        all_of_them = [ours, replace(ours, share_prefix="off", name="mlxtune, prefix not shared"), *others]
    elif name == "prefix":
        title += f"; the recipe has no {SHARED_PREFIX}: nothing is shared"
    speeds = {each.name: partial(speed, each, workload, bench) for each in all_of_them}
    results = {title: take_turns(name, speeds, bench.repeats)}
    if name == "short":
        results["short: losses of each batch from a fresh model, nats per token"] = batch_losses(bench, workload)
        results["short: the whole command, 100 updates of batch 8"] = whole_command(bench)
    if name == "vocabulary":
        results[f"vocabulary: the loss block alone, {VOCABULARY} tokens"] = loss_block(bench)
    return results


def described(workload: Workload) -> str:
    rows = read_rows(workload.rows)
    lengths, updates = [len(tokens) for tokens, _ in rows], len(rows) // workload.batch_size
    return (
        f"{len(rows)} rows of {min(lengths)} to {max(lengths)} tokens ({common(rows)} of them common to all, "
        f"{supervised(rows)} supervised in all); batch {workload.batch_size}, {updates} updates to warm up, then "
        f"{updates * (workload.epochs - 1)}"
    )


def batch_losses(bench: Bench, workload: Workload) -> dict[str, Outcome]:
    """The largest difference of each peer's losses from mlxtune's: of each batch, before and after an update on it."""
    apart = replace(workload, epochs=2)
    ours, *peers = (each for each in contenders(bench) if each.float32 or each.trainer == "mlxtune")

    def difference(peer: Contender) -> Figures:
        both = (one_training(each, apart, bench, compared=True)["losses"] for each in (ours, peer))
        differences = [abs(one - other) for one, other in zip(*both, strict=True)]
        return {"losses": len(differences), "largest": max(differences)}

    return take_turns("losses", {f"mlxtune - {peer.trainer}": partial(difference, peer) for peer in peers}, 1)


def whole_command(bench: Bench) -> dict[str, Outcome]:
    """`mlxtune train` and `mlx_lm lora --train` as in bench_chain, validation before and after included."""
    folder = bench.folder("command")
    prepare(bench.base, bench.data / "banking77", folder)
    chains = {"mlxtune": mlxtune_chain, "mlx-lm": mlx_lm_chain}

    def seconds(contender: Contender) -> Figures:
        out = Path(tempfile.mkdtemp(dir=folder))
        (out / "model").symlink_to(folder / "model")
        command = dict(chains[contender.trainer](out))["train"]
        return {"command s": timed(command, bench.limit, contender.environment, folder)[0]}

    actions = {each.name: partial(seconds, each) for each in contenders(bench) if each.trainer in chains}
    return take_turns("whole command", actions, bench.repeats)


def loss_block(bench: Bench) -> dict[str, Outcome]:
    """Gigabytes of the head, the loss and the gradient down to the hidden states, above the body's."""
    folder = bench.folder("block")
    rows = written(folder, random_rows(12, 512))
    thin = partial(random_model, bench, hidden=256, blocks=1, inner=64, heads=4)
    bases = [thin(folder / f"{size}", vocabulary=size) for size in (VOCABULARY, 512)]
    full, body = (Workload(model=base, rows=rows, batch_size=4, epochs=2) for base in bases)

    def above_weights(contender: Contender, workload: Workload) -> float:
        found = one_training(contender, workload, bench)
        return found["peak_gb"] - found["resident_gb"]

    def block(contender: Contender) -> Figures:
        return {"block GB": above_weights(contender, full) - above_weights(contender, body)}

    return take_turns("loss block", {each.name: partial(block, each) for each in contenders(bench)}, bench.repeats)


def workers(bench: Bench) -> dict[str, Outcome]:
    """Two workers on this machine, started as `mlx.launch` does, against one process; the whole batch is the same."""
    folder = bench.folder("workers")
    prepare(bench.base, bench.data / "banking77", folder)
    base = random_model(bench, folder / "base", **BODY)
    mlxtune, hosts = Path(sys.executable).with_name("mlxtune"), folder / "hosts.json"
    hosts.write_text('[["127.0.0.1:31871"], ["127.0.0.1:31872"]]')
    both = f"export MLX_HOSTFILE={hosts}; MLX_RANK=1 $0 $@ & MLX_RANK=0 $0 $@; wait"  # `mlx.launch` takes a core itself
    launch = ["bash", "-c", both]
    starts = {"two workers": launch, "one process, all cores": [], "one process, one core": ["taskset", "-c", 0]}

    def figures(start: list[object]) -> Figures:
        out = Path(tempfile.mkdtemp(dir=folder))
        (out / "model").symlink_to(base)
        arguments = dict(mlxtune_chain(out))["train"][3:]  # behind `python -m mlxtune`
        command = [*start, mlxtune, *arguments, "--iters", 20, "--steps-per-eval", 20]
        seconds, printed = timed(command, bench.limit, {}, folder)
        return {"tokens/s": tokens_per_second(printed[printed.index("{") :]), "command s": seconds}

    return take_turns("workers", {name: partial(figures, start) for name, start in starts.items()}, bench.repeats)


def summary(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Medians of each contender, and the first one's shares: its figure by this one's, the median over the turns."""
    ours = next(iter(outcomes.values())).runs
    found = {}
    for name, each in outcomes.items():
        figures, turns = (list(ours[0]) if each.runs else []), list(zip(ours, each.runs, strict=False))
        median = {figure: statistics.median(run[figure] for run in each.runs) for figure in figures}
        share = {figure: statistics.median(one[figure] / run[figure] for one, run in turns) for figure in figures}
        found[name] = {"median": median, "share": share, "runs": each.runs, "gave_up": each.gave_up}
    return found


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    first = next(iter(found))
    print(f"\n{title}\n{'':<28}" + "".join(f"{figure:>13}{'':9}" for figure in found[first]["median"]).rstrip())
    for name, each in found.items():
        shares = {figure: f"{share:>7.3g} x" if name != first else " " * 9 for figure, share in each["share"].items()}
        cells = "".join(f"{value:>13.4g}{shares[figure]}" for figure, value in each["median"].items())
        left_out = f"  left out after {len(each['runs'])} turns: {each['gave_up']}" if each["gave_up"] else ""
        print(f"{name:<28}{cells}{left_out}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model, such as stories260K")
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77 and gsm8k in it")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=[*WORKLOADS, "workers"])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender; the medians are shown")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a process is stopped")
    parser.add_argument("--unsloth-python", metavar="PATH", help="a Python with unsloth_zoo, for one more peer")
    parser.add_argument("--json", action="store_true", help="print every figure of every turn")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            base=with_template(args.model, Path(scratch) / "model"), data=args.data.resolve(), work=Path(scratch),
            limit=args.limit, repeats=args.repeats, unsloth=args.unsloth_python,
        )  # fmt: skip
        for name in args.workloads:
            results |= {title: summary(outcomes) for title, outcomes in measured(name, bench).items()}
    if args.json:
        print(json.dumps({"machine": asdict(machine.facts()), "results": results}))
        return
    for title, found in results.items():
        show(title, found)


if __name__ == "__main__":
    main()

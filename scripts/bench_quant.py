"""What quantizing loses: KL to the source model of mlxtune's methods and of mlx-lm's, at equal bits per weight.

    python scripts/bench_quant.py [--model MODEL_FOLDER] [--data FOLDER_OF_DATA_SETS] [--bits 4 3] [--rows 96]
        [--calibration-rows 240] [--own-start TOKEN] [--learn] [--skip-budget] [--json]

Held-out rows: with --data the test rows of gsm8k and banking77 and War and Peace from 60 % on, of which the embedded
model has read none; calibration rows are training rows of the same sets and War and Peace from 40 % to 60 %. Without
--data the model writes both itself, from two seeds. Rows have 128 tokens. Figures are over every position: mean,
median and 99th percentile of KL(source || quantized) in nats, the share of positions with the same top token, and
the mean KL over that of mlx-lm with as many bits. Both packages quantize the layers whose inputs the group size
divides, and all values are computed in float32.

Methods: mlx-lm (its quantize_model), search (no data), imatrix, gptq and, where mlx-lm knows the architecture and the
group size divides all layers, its awq on calibration rows, and these on rows that the model writes itself, which needs
no data either; with --learn dwq after gptq on the same rows. Budgeted: bits from
2 to 8 for each layer, chosen by the KL that each adds on a few of these rows, against mlx-lm's equal bits and its
mixed recipes at no more than their bits. Seconds are those of choosing the values.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxtune import machine

machine.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import mlxtune  # noqa: E402
from mlxtune import model  # noqa: E402
from mlxtune.data.render import Sample  # noqa: E402
from mlxtune.metrics import divergence  # noqa: E402
from mlxtune.quant import awq, budget, calibrate, dwq, gptq, imatrix, own_text, search  # noqa: E402
from mlxtune.quant.packing import Packed, Packing, dequantized  # noqa: E402

from mlx_lm.convert import mixed_quant_predicate_builder  # noqa: E402  isort: skip
from mlx_lm.utils import quantize_model  # noqa: E402  isort: skip

LENGTH = 128  # tokens of a row
SENSITIVITY_ROWS = 16
RECIPES = ("mixed_3_4", "mixed_3_6", "mixed_4_6")
WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One method: bits per weight over the layers it packs, and what it lost."""

    at: str
    method: str
    bits_per_weight: float
    kl: float
    kl_error: float | None
    ratio: float
    median: float
    percentile_99: float
    same_top: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Bench:
    """A source, a copy whose weights are changed, its layers, and the rows."""

    folder: Path
    source: nn.Module
    copy: nn.Module
    weights: dict[str, mx.array]
    group_size: int
    test: list[Sample]
    rows: dict[str, list[Sample]]  # calibration rows, by the name of where they are from

    def loss_of(self, values: dict[str, mx.array]) -> divergence.Divergence:
        layers = dict(self.copy.named_modules())
        for name, value in values.items():
            layers[name].weight = value
        return divergence.measure(self.source, self.copy, self.test, 16)

    def bits_of(self, packings: dict[str, Packing]) -> int:
        width = 8 * next(iter(self.weights.values())).itemsize
        return sum(budget.stored_bits(self.weights[name].shape, each, width) for name, each in packings.items())

    def line(self, at: str, method: str, packings: dict[str, Packing], pack: budget.Pack, than: float | None) -> Line:
        started = time.perf_counter()
        values = {name: dequantized(pack(name, self.weights[name], each), each) for name, each in packings.items()}
        mx.eval(values)
        seconds = time.perf_counter() - started
        return self.measured(at, method, self.bits_of(packings), self.loss_of(values), than, seconds)

    def learned(self, at: str, rows: str, packings: dict[str, Packing], pack: budget.Pack, than: float) -> Line:
        started = time.perf_counter()
        packed = {name: pack(name, self.weights[name], each) for name, each in packings.items()}
        layers = dict(self.copy.named_modules())
        for name, weight in self.weights.items():
            layers[name].weight = weight
        packed = dwq.learn(self.source, self.copy, packed, packings, self.rows[rows])
        seconds = time.perf_counter() - started
        found = self.loss_of({name: dequantized(each, packings[name]) for name, each in packed.items()})
        return self.measured(at, f"gptq + dwq, {rows}", self.bits_of(packings), found, than, seconds)

    def scaled(self, at: str, rows: str, packings: dict[str, Packing], packing: Packing, than: float) -> Line | None:
        """mlx-lm's awq, where it packs just the layers that the others do."""
        loaded = model.load(self.folder)
        if not awq.knows(loaded.config) or awq.layers_of(loaded.net, loaded.config) != packings.keys():
            return None
        started = time.perf_counter()
        awq.quantize(loaded.net, loaded.config, self.rows[rows], packing)
        seconds = time.perf_counter() - started
        found = divergence.measure(self.source, loaded.net, self.test, 16)
        return self.measured(at, f"awq, {rows}", self.bits_of(packings), found, than, seconds)

    def measured(
        self, at: str, method: str, bits: int, found: divergence.Divergence, than: float | None, seconds: float
    ) -> Line:
        return Line(
            at=at,
            method=method,
            bits_per_weight=bits / sum(each.size for each in self.weights.values()),
            kl=found.kl_mean,
            kl_error=found.kl_error,
            ratio=1.0 if than is None else found.kl_mean / than,
            median=found.kl_median,
            percentile_99=found.kl_99,
            same_top=found.same_top,
            seconds=seconds,
        )

    def of_mlx_lm(self, at: str, bits: int, predicate: Callable[..., object] | None) -> tuple[Line, dict[str, Packing]]:
        """mlx-lm's own quantization of the model, and how it packed each layer."""
        loaded = model.load(self.folder)
        started = time.perf_counter()
        net, _ = quantize_model(loaded.net, loaded.config, self.group_size, bits, quant_predicate=predicate)
        mx.eval(net.parameters())
        seconds = time.perf_counter() - started
        layers = {name: each for name, each in net.named_modules() if "scales" in each}
        packings = {name: Packing(each.bits, each.group_size, each.mode) for name, each in layers.items()}
        assert packings.keys() == self.weights.keys()
        stored = sum(
            8 * weight.nbytes
            for each in layers.values()
            for name, weight in tree_flatten(each.parameters())
            if name in ("weight", "scales", "biases")
        )
        assert stored == self.bits_of(packings)
        values = {
            name: dequantized(Packed(each.weight, each.scales, each.biases), packings[name])
            for name, each in layers.items()
        }
        return self.measured(at, "mlx-lm", stored, self.loss_of(values), None, seconds), packings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(mlxtune.__file__).parent / "assets" / "tiny")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--calibration-rows", type=int, default=240)
    parser.add_argument("--own-start", type=int, help="token that the model's own rows start from; default: its first")
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--skip-budget", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    bench = prepared(asked)
    lines = []
    for line in run(bench, asked.bits, asked.learn, not asked.skip_budget):
        lines.append(line)
        print(json.dumps(asdict(line)) if asked.json else shown(line), flush=True)


def prepared(asked: argparse.Namespace) -> Bench:
    """The model twice, and its rows."""
    lm = model.load(asked.model)
    config = lm.config
    start = asked.own_start if asked.own_start is not None else int(config.get("bos_token_id") or 0)
    own = own_text.write(lm.net, asked.calibration_rows, LENGTH, start, seed=2)
    if asked.data is None:
        test, rows = own_text.write(lm.net, asked.rows, LENGTH, start, seed=1), {"own rows": own}
    else:
        end = lm.tokenizer.eos_token_id
        test = cut(lm.tokenizer.encode, texts(asked.data, held_out=True), end, asked.rows)
        calibration = cut(lm.tokenizer.encode, texts(asked.data, held_out=False), end, asked.calibration_rows)
        rows = {"rows": calibration, "own rows": own}
    weights = {
        name: each.weight
        for name, each in lm.net.named_modules()
        if hasattr(each, "to_quantized") and each.weight.shape[-1] % asked.group_size == 0
    }
    return Bench(asked.model, lm.net, model.load(asked.model).net, weights, asked.group_size, test, rows)


def texts(data: Path, held_out: bool) -> list[Iterator[str]]:
    """The texts of the three sets, as long as they last."""
    part = "test" if held_out else "train"

    def gsm8k() -> Iterator[str]:
        with next((data / "gsm8k").glob(f"*{part}*")).open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                yield f"{row['question']}\n{row['answer']}"

    def banking77() -> Iterator[str]:
        with next((data / "banking77").glob(f"*{part}*")).open(encoding="utf-8", newline="") as file:
            yield from (row["text"] for row in csv.DictReader(file))

    def book() -> Iterator[str]:
        text = (data / "text" / "war-and-peace.txt").read_text(encoding="utf-8")
        start, stop = (0.6, 1.0) if held_out else (0.4, 0.6)
        yield text[int(start * len(text)) : int(stop * len(text))][:400_000]

    return [gsm8k(), banking77(), book()]


def cut(encode: Callable[[str], list[int]], sets: list[Iterator[str]], end: int, rows: int) -> list[Sample]:
    """Rows of LENGTH tokens, as many of each set, texts one behind the other."""
    made = []
    for texts_ in sets:
        tokens: list[int] = []
        each = rows // len(sets)
        while len(tokens) < each * LENGTH:
            tokens += [*encode(next(texts_)), end]
        made += [tokens[row * LENGTH : (row + 1) * LENGTH] for row in range(each)]
    return [Sample(f"row:{row}", tokens, [True] * LENGTH, 0, None) for row, tokens in enumerate(made, 1)]


def run(bench: Bench, bits: list[int], learn: bool, budgeted: bool) -> Iterator[Line]:
    """Every line, as it is measured."""
    inputs = {
        name: {
            layer: each
            for part in calibrate.gathered(lambda: bench.source, rows, list(bench.weights), hessian=True)
            for layer, each in part.items()
            if each is not None
        }
        for name, rows in bench.rows.items()
    }
    methods: dict[str, budget.Pack] = {"search": lambda name, weight, packing: search.pack(weight, packing)}
    for rows, of in inputs.items():
        for module in (imatrix, gptq):

            def pack(name: str, weight: mx.array, packing: Packing, module: object = module, of: object = of) -> Packed:
                if name not in of:
                    return search.pack(weight, packing)
                return module.pack(weight, packing, of[name])

            methods[f"{module.__name__.rpartition('.')[2]}, {rows}"] = pack
    plains = {}
    for width in bits:
        at = f"{width} bits"
        plain, packings = plains[at] = bench.of_mlx_lm(at, width, None)
        yield plain
        for method, pack in methods.items():
            yield bench.line(at, method, packings, pack, plain.kl)
        for rows in bench.rows:
            scaled = bench.scaled(at, rows, packings, Packing(width, bench.group_size), plain.kl)
            if scaled is not None:
                yield scaled
        for rows in bench.rows if learn else ():
            yield bench.learned(at, rows, packings, methods[f"gptq, {rows}"], plain.kl)
    if not budgeted:
        return
    options = [Packing(width, bench.group_size) for width in WIDTHS]
    plans = {}
    for rows, samples in bench.rows.items():
        reference = divergence.Reference(bench.source, samples[:: max(1, len(samples) // SENSITIVITY_ROWS)])
        for what, measured in (("", None), (", one width asked", [Packing(3, bench.group_size)])):
            started = time.perf_counter()
            costs = budget.sensitivities(
                bench.source, list(bench.weights), options, methods["search"], reference.kl, measured=measured
            )
            plans[rows + what] = costs, time.perf_counter() - started
    for recipe in RECIPES:
        predicate = mixed_quant_predicate_builder(recipe, bench.source, bench.group_size)
        plain, packings = plains[recipe] = bench.of_mlx_lm(recipe, 4, predicate)
        yield plain
        yield bench.line(recipe, "search, its bits", packings, methods["search"], plain.kl)
    for at, (plain, packings) in plains.items():
        for rows, (costs, seconds) in plans.items():
            sizes = {name: {each: bench.bits_of({name: each}) for each in found} for name, found in costs.items()}
            chosen = budget.assign(costs, sizes, bench.bits_of(packings))
            yield bench.line(at, f"search, bits by {rows} ({seconds:.0f} s)", chosen, methods["search"], plain.kl)
            best = f"gptq, {rows.partition(',')[0]}"
            yield bench.line(at, f"{best}, bits by {rows}", chosen, methods[best], plain.kl)


def shown(line: Line) -> str:
    return (
        f"{line.at:10} {line.method:48} {line.bits_per_weight:6.3f} bits  KL {line.kl:.5f} ± {line.kl_error or 0:.5f}  "
        f"x {line.ratio:.3f}  median {line.median:.5f}  99 % {line.percentile_99:.4f}  "
        f"same top {line.same_top:.2%}  {line.seconds:.1f} s"
    )


if __name__ == "__main__":
    main()

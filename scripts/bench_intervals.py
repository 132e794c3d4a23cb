"""How often 95 % intervals hold the truth, on simulated rows: those of `mlxtune.metrics` and what else is common.

    python scripts/bench_intervals.py [--sets 2000] [--seed 0] [--json]

Each line is one distribution, and n rows a data set; of its intervals the share that hold the true figure is given,
in per cent, with the median width relative to ours. ours: bootstrap-t. Beside it, from the same resamples: the
percentile interval, BCa, and the normal one (figure ± 1.96 standard errors). The true figure is known or taken from
a million rows. By chance alone, the share of 2,000 intervals is off by 0.5 points (one standard error). Shares,
differences of rights, macro-F1 and ECE have intervals of their own; that of ECE is slow: a twentieth of the sets.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from mlxtune.metrics.calibration import calibration, ece
from mlxtune.metrics.f1 import macro_f1
from mlxtune.metrics.intervals import NORMAL, RESAMPLES, Z, bootstrap_ratios, wilson
from mlxtune.metrics.significance import paired_shares

Numbers = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], tuple[Numbers, Numbers]]  # n, sets -> sums and weights, (G, sets)
AT_ONCE = 250  # data sets whose resamples are held in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Coverage in per cent of each method, and its median width over ours."""

    data: str
    n: int
    coverage: dict[str, float]
    width: dict[str, float]


def normal(random: np.random.Generator, n: int, sets: int) -> tuple[Numbers, Numbers]:
    return random.normal(size=(n, sets)), np.ones((n, sets))


def log_normal(deviation: float) -> Draw:
    """A mean of 1, and the skewness of losses and more."""

    def draw(random: np.random.Generator, n: int, sets: int) -> tuple[Numbers, Numbers]:
        return random.lognormal(-(deviation**2) / 2, deviation, (n, sets)), np.ones((n, sets))

    return draw


def losses(random: np.random.Generator, n: int, sets: int) -> tuple[Numbers, Numbers]:
    """Rows of 1 to 60 tokens, the short ones with more nats a token: as sums of nats and numbers of tokens."""
    tokens = random.integers(1, 61, size=(n, sets)).astype(np.float64)
    return tokens * (1 + 2 / tokens) * random.lognormal(-0.28125, 0.75, (n, sets)), tokens


def scores(random: np.random.Generator, n: int, sets: int) -> tuple[Numbers, Numbers]:
    """As ROUGE-L of a good model: seven of ten answers perfect, the others anywhere."""
    return np.where(random.random((n, sets)) < 0.7, 1, random.beta(2, 2, (n, sets))), np.ones((n, sets))


def grouped(size: int, spread: Callable[[np.random.Generator, tuple[int, int]], Numbers]) -> Draw:
    """n rows in n / size groups of 1 to 2 · size - 1 rows; half of the variance is between groups."""

    def draw(random: np.random.Generator, n: int, sets: int) -> tuple[Numbers, Numbers]:
        shape = (n // size, sets)
        rows = random.integers(1, 2 * size, size=shape).astype(np.float64)
        return rows * spread(random, shape) + np.sqrt(rows) * random.normal(size=shape), rows

    return draw


def grouped_rights(size: int) -> Draw:
    """Rights and wrongs, each group with a share of its own around 2/3 (correlation 1/4 within groups)."""

    def draw(random: np.random.Generator, n: int, sets: int) -> tuple[Numbers, Numbers]:
        rows = random.integers(1, 2 * size, size=(n // size, sets))
        return random.binomial(rows, random.beta(2, 1, rows.shape)).astype(np.float64), rows.astype(np.float64)

    return draw


def even(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    return random.normal(size=shape)


def skewed(random: np.random.Generator, shape: tuple[int, int]) -> Numbers:
    return random.lognormal(-0.28125, 0.75, shape)


MEANS: list[tuple[str, Draw, float]] = [
    ("normal", normal, 0.0),
    ("log-normal 0.5", log_normal(0.5), 1.0),
    ("log-normal 0.75", log_normal(0.75), 1.0),
    ("log-normal 1", log_normal(1.0), 1.0),
    ("losses by tokens", losses, 32.5 / 30.5),
    ("scores in [0, 1]", scores, 0.85),
    ("groups of 2, normal", grouped(2, even), 0.0),
    ("groups of 2, skewed", grouped(2, skewed), 1.0),
    ("groups of 2, rights", grouped_rights(2), 2 / 3),
    ("groups of 5, normal", grouped(5, even), 0.0),
    ("groups of 5, skewed", grouped(5, skewed), 1.0),
    ("groups of 5, rights", grouped_rights(5), 2 / 3),
]


def others(over: Numbers, under: Numbers) -> dict[str, tuple[Numbers, Numbers]]:
    """Percentile, BCa and normal intervals of ratios of sums, of (N, S) -> (S,)."""
    n, _ = over.shape
    total = under.sum(axis=0)
    ratio = over.sum(axis=0) / total
    off = over - ratio * under
    error = np.sqrt(n / (n - 1) * (off**2).sum(axis=0)) / total
    drawn = np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n * RESAMPLES).reshape(RESAMPLES, n).astype(np.float64)
    moved = np.sort((counts @ off) / (counts @ under), axis=0)
    share = np.clip((moved < 0).mean(axis=0), 1 / RESAMPLES, 1 - 1 / RESAMPLES)
    bias = np.array([NORMAL.inv_cdf(each) for each in share])
    acceleration = (off**3).sum(axis=0) / (6 * np.maximum((off**2).sum(axis=0), 1e-300) ** 1.5)

    def bca(z: float) -> Numbers:
        at = bias + (bias + z) / (1 - acceleration * (bias + z))
        place = np.array([NORMAL.cdf(each) for each in at]) * (RESAMPLES - 1)
        return ratio + np.take_along_axis(moved, place.round().astype(int)[None], axis=0)[0]

    low, high = np.percentile(moved, [2.5, 97.5], axis=0)
    return {
        "percentile": (ratio + low, ratio + high),
        "BCa": (bca(-Z), bca(Z)),
        "normal": (ratio - Z * error, ratio + Z * error),
    }


def summed_up(data: str, n: int, truth: float, found: dict[str, tuple[Numbers, Numbers]]) -> Line:
    held = {name: 100 * float(((low <= truth) & (truth <= high)).mean()) for name, (low, high) in found.items()}
    width = {name: float(np.median(high - low)) for name, (low, high) in found.items()}
    return Line(data=data, n=n, coverage=held, width={name: each / width["ours"] for name, each in width.items()})


def means(random: np.random.Generator, sets: int, n: int) -> Iterator[Line]:
    for data, draw, truth in MEANS:
        found: dict[str, list[tuple[Numbers, Numbers]]] = {}
        for start in range(0, sets, AT_ONCE):
            over, under = draw(random, n, min(AT_ONCE, sets - start))
            for name, ends in {"ours": bootstrap_ratios(over, under), **others(over, under)}.items():
                found.setdefault(name, []).append(ends)
        joined = {
            name: (np.concatenate([low for low, _ in ends]), np.concatenate([high for _, high in ends]))
            for name, ends in found.items()
        }
        yield summed_up(data, n, truth, joined)


def shares(random: np.random.Generator, sets: int, n: int) -> Iterator[Line]:
    for truth in (0.02, 0.1, 0.5, 0.9):
        right = random.binomial(n, truth, sets)
        p, spread = right / n, Z * np.sqrt(right * (n - right) / n**3)
        yield summed_up(
            f"rights, share {truth}", n, truth, {"ours": ends(wilson, right, n), "normal": (p - spread, p + spread)}
        )
    for better, worse in ((0.05, 0.02), (0.2, 0.1), (0.6, 0.02)):
        counts = random.multinomial(n, [better, worse, 1 - better - worse], sets)
        difference = (counts[:, 0] - counts[:, 1]) / n
        spread = Z * np.sqrt(np.maximum(counts[:, :2].sum(axis=1) / n - difference**2, 0) / n)
        yield summed_up(
            f"difference {better} - {worse}",
            n,
            better - worse,
            {
                "ours": ends(lambda both, rows: paired_shares(int(both[0]), int(both[1]), rows), counts, n),
                "normal": (difference - spread, difference + spread),
            },
        )


def ends(
    interval: Callable[..., tuple[float, float]], counts: npt.NDArray[np.int64], n: int
) -> tuple[Numbers, Numbers]:
    low, high = np.array([interval(each, n) for each in counts]).T
    return low, high


def classes(random: np.random.Generator, sets: int, n: int) -> Iterator[Line]:
    """Macro-F1 of a model that is right in a share of rows, else gives any label or one outside the set."""
    for data, prior, right in (
        ("macro-F1, 4 even classes", [0.25] * 4, 0.8),
        ("macro-F1, 4 uneven classes", [0.6, 0.2, 0.15, 0.05], 0.8),
        ("macro-F1, 20 even classes", [0.05] * 20, 0.8),
    ):
        names = [str(number) for number in range(len(prior) + 1)]

        def rows(count: int, prior: list[float] = prior, right: float = right) -> tuple[npt.NDArray[np.int64], ...]:
            expected = random.choice(len(prior), count, p=prior)
            guessed = random.integers(0, len(prior) + 1, count)
            return expected, np.where(random.random(count) < right, expected, guessed)

        expected, given = rows(1_000_000)
        answered = np.bincount(given, minlength=len(names))[:-1]
        truth = float((2 * np.bincount(expected[expected == given]) / (np.bincount(expected) + answered)).mean())
        found = []
        for _ in range(sets):
            expected, given = rows(n)
            score = macro_f1([names[each] for each in given], [names[each] for each in expected])
            found.append((score.ci_low, score.ci_high))
        low, high = np.array(found).T
        yield summed_up(data, n, truth, {"ours": (low, high)})


def confidences(random: np.random.Generator, sets: int, n: int) -> Iterator[Line]:
    """ECE of a model that is right less often than it is sure, by some points."""
    for less in (0.0, 0.05, 0.2):

        def rows(count: int, less: float = less) -> tuple[Numbers, npt.NDArray[np.bool_]]:
            sure = random.beta(4, 1.2, count)
            return sure, random.random(count) < np.clip(sure - less, 0, 1)

        truth = calibration(*rows(1_000_000)).ece  # type: ignore[arg-type]
        found = []
        for _ in range(sets):
            score = ece(*rows(n))  # type: ignore[arg-type]
            found.append((score.ci_low, score.ci_high))
        low, high = np.array(found).T
        yield summed_up(f"ECE, too sure by {less}", n, truth, {"ours": (low, high)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000, help="data sets of a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    lines = []
    for n in (50, 200):
        few = math.ceil(args.sets / 20)
        for part in (
            means(random, args.sets, n),
            shares(random, args.sets, n),
            classes(random, args.sets, n),
            confidences(random, few, n),
        ):
            for line in part:
                lines.append(line)
                if not args.json:
                    others_text = "  ".join(
                        f"{name} {held:5.1f} (x {line.width[name]:.2f})"
                        for name, held in line.coverage.items()
                        if name != "ours"
                    )
                    print(f"n {n:3d}  {line.data:27s} ours {line.coverage['ours']:5.1f} %   {others_text}", flush=True)
    if args.json:
        print(json.dumps([asdict(line) for line in lines]))


if __name__ == "__main__":
    main()

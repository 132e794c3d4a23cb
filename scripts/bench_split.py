"""What a split by chance leaks, and what that does to a score: clinc150, and banking77 if given.

    python scripts/bench_split.py --clinc CLINC150/data_full.json [--banking BANKING77_FOLDER] [--seeds 3] [--json]

The rows of all files of a set are pooled and split twice, in the same sizes (test 20 %): leak-safe by `mlxtune.data`,
and by chance. Leaked: a test row with an equal row in train, or one of at least that similarity. Accuracy: of one
small classifier, multinomial logistic regression in numpy on hashed words and pairs of words, trained on either train
part and asked the test part; it is no language model. Accuracy on rows that did not leak: on the test rows without a
neighbour in train of the similarity that keeps rows together; in a split by chance these are the unusual ones. Rows
that the leak-safe split leaves out are left out by chance in the other. Medians over seeds.
"""

import argparse
import csv
import json
import random
import re
import statistics
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxtune.data.files import Row
from mlxtune.data.formats import Completion
from mlxtune.data.similar import THRESHOLD, Alike, neighbours
from mlxtune.data.split import Pairs, assign, leaked
from mlxtune.recipe import DataRecipe

TEST, NEAR = 0.2, (0.8, THRESHOLD)
FEATURES, EPOCHS, BATCH, RATE, DECAY = 1 << 15, 12, 64, 0.5, 1e-5


def clinc(path: Path) -> list[tuple[str, str]]:
    """The questions of the 150 intents in train, val and test; those out of scope are left aside."""
    parts = json.loads(path.read_text(encoding="utf-8"))
    return [(text, intent) for name in ("train", "val", "test") for text, intent in parts[name]]


def banking(folder: Path) -> list[tuple[str, str]]:
    found = []
    for name in ("train.csv", "test.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            found += [(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]
    return found


def hashed(text: str) -> list[int]:
    """The words and the pairs of neighbouring words as numbers below `FEATURES`."""
    words = re.findall(r"\w+", text.lower())
    found = {*words, *(f"{a} {b}" for a, b in zip(["", *words], [*words, ""], strict=True))}
    return [zlib.crc32(each.encode()) % FEATURES for each in found]


def accuracy_by_row(features: list[list[int]], labels: np.ndarray, sides: Sequence[str | None], seed: int) -> dict:
    """Whether each test row is right, by its place: softmax regression by AdaGrad (Duchi et al. 2011)."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((FEATURES, labels.max() + 1), np.float32)
    squares = np.full(weights.shape, 1e-6, np.float32)
    train = np.array([place for place, side in enumerate(sides) if side == "train"])
    for _ in range(EPOCHS):
        rng.shuffle(train)
        for start in range(0, len(train), BATCH):
            batch = train[start : start + BATCH]
            wrong = probabilities(weights, features, batch)  # (B, C)
            wrong[np.arange(len(batch)), labels[batch]] -= 1
            flat = np.concatenate([features[place] for place in batch])
            rows, at = np.unique(flat, return_inverse=True)
            owner = np.repeat(np.arange(len(batch)), [len(features[place]) for place in batch])
            used = np.zeros((len(rows), len(batch)), np.float32)
            used[at, owner] = 1 / np.sqrt([len(features[place]) for place in batch])[owner]
            slope = used @ wrong / len(batch) + DECAY * weights[rows]
            squares[rows] += slope**2
            weights[rows] -= RATE * slope / np.sqrt(squares[rows])
    test = [place for place, side in enumerate(sides) if side == "test"]
    guessed = np.concatenate(
        [probabilities(weights, features, test[at : at + 256]).argmax(1) for at in range(0, len(test), 256)]
    )
    return dict(zip(test, (guessed == labels[test]).tolist(), strict=True))


def probabilities(weights: np.ndarray, features: list[list[int]], places: Sequence[int]) -> np.ndarray:
    scores = np.stack([weights[features[place]].sum(0) / np.sqrt(len(features[place])) for place in places])
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def measure(examples: list[tuple[str, str]], seeds: int) -> dict[str, float]:
    """The medians over seeds; rows are shuffled first, as both sets lie in the order of their intents."""
    random.Random(0).shuffle(examples)
    rows: Pairs = [
        (Row("pool", line, {"prompt": text, "completion": intent}), Completion(text, intent))
        for line, (text, intent) in enumerate(examples, start=1)
    ]
    alike = neighbours([text for text, _ in examples])
    features = [hashed(text) for text, _ in examples]
    names = sorted({intent for _, intent in examples})
    labels = np.array([names.index(intent) for _, intent in examples])
    runs = []
    for seed in range(seeds):
        safe = assign(rows, DataRecipe(test=TEST, valid=0), seed, None, alike=alike)
        chance = list(safe)
        random.Random(seed).shuffle(chance)
        runs.append(figures(alike, features, labels, {"safe": safe, "chance": chance}, seed))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def figures(
    alike: Alike, features: list[list[int]], labels: np.ndarray, splits: dict[str, list[str | None]], seed: int
) -> dict[str, float]:
    safe = splits["safe"]
    found: dict[str, float] = {"rows": len(safe), "test_rows": safe.count("test"), "left_out": safe.count(None)}
    for name, sides in splits.items():
        for near in NEAR:
            found[f"leaked_{near}_{name}"] = len(leaked(alike, sides, near)) / sides.count("test")
        right = accuracy_by_row(features, labels, sides, seed)
        found[f"accuracy_{name}"] = statistics.mean(right.values())
        met = set(leaked(alike, sides, THRESHOLD))
        found[f"accuracy_{name}_not_leaked"] = statistics.mean(hit for place, hit in right.items() if place not in met)
    return found


def show(name: str, found: dict[str, float]) -> None:
    print(
        f"{name}: {found['rows']:,.0f} rows, {found['test_rows']:,.0f} for the test, {found['left_out']:,.0f} left out"
    )
    print(f"{'':<36}{'by chance':>11}{'leak-safe':>11}")
    lines = [(f"leaked, similarity >= {near}", f"leaked_{near}_") for near in NEAR]
    lines.append(("accuracy", "accuracy_"))
    for title, key in lines:
        print(f"{title:<36}{found[f'{key}chance']:>11.1%}{found[f'{key}safe']:>11.1%}")
    clean = [found[f"accuracy_{split}_not_leaked"] for split in ("chance", "safe")]
    print(f"{'accuracy on rows that did not leak':<36}{clean[0]:>11.1%}{clean[1]:>11.1%}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clinc", type=Path, required=True, help="clinc150's data_full.json")
    parser.add_argument("--banking", type=Path, help="folder of banking77's train.csv and test.csv")
    parser.add_argument("--seeds", type=int, default=3, help="the medians are shown")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON")
    args = parser.parse_args()
    sets = {"clinc150": clinc(args.clinc)} | ({"banking77": banking(args.banking)} if args.banking else {})
    found = {name: measure(examples, args.seeds) for name, examples in sets.items()}
    if args.json:
        print(json.dumps(found))
        return
    for name, medians in found.items():
        show(name, medians)


if __name__ == "__main__":
    main()

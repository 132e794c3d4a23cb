"""Trains `tiny`, the base model that ships inside mlxtune, from scratch on a folder of open text.

    python scripts/pretrain_tiny.py --text DATA_FOLDER --out mlxtune/assets/tiny

DATA_FOLDER holds the public data sets of `CORPORA` under their own names. The run is deterministic: one BLAS thread,
fixed seeds, a fixed number of steps. It takes about 40 minutes on one core with an OpenBLAS.
--out gets the weights, the tokenizer, and the figures of the run as training.json and as training.svg. Its README.md,
the model card, is written by hand from them.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # sums in one order, so the run repeats

from mlxtune import machine

machine.prepare()  # before mlx.core: loads an OpenBLAS where one is installed

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits

from mlxtune.report import chart

SEED = 7
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
HELD_OUT_PERCENT = 1
COLOURS = ":root{--muted:#555;--text:#222;--card:#fff;--line:#ddd;--train:#9aa;--accent:#06c;background:#fff}"


def chat(user: str, assistant: str) -> str:
    """One question and answer in the chat template of the model."""
    return f"{TURN_START}user\n{user.strip()}{TURN_END}\n{TURN_START}assistant\n{assistant.strip()}{TURN_END}\n"


def gsm8k(folder: Path) -> Iterator[str]:
    for line in (folder / "gsm8k/train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        answer = re.sub(r"\n?####\s*(.*)$", r"\nThe answer is \1.", answer)
        yield chat(row["question"], answer)


def self_instruct(folder: Path) -> Iterator[str]:
    for name in ("seed_tasks", "user_oriented_instructions"):
        for line in (folder / f"self_instruct/{name}.jsonl").open(encoding="utf-8"):
            row = json.loads(line)
            for instance in row["instances"]:
                yield chat(f"{row['instruction']}\n{instance['input']}", instance["output"])


def same_topic(groups: dict[str, list[str]], rng: random.Random) -> Iterator[str]:
    """Utterances that mean the same, as short lists and as chats that say it in other words."""
    for utterances in groups.values():
        rng.shuffle(utterances)
        for start in range(0, len(utterances), 8):
            part = utterances[start : start + 8]
            yield "\n".join(part) + "\n"
            yield from (chat(a, b) for a, b in zip(part[::2], part[1::2], strict=False))


def banking77(folder: Path) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    with (folder / "banking77/train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["category"], []).append(" ".join(row["text"].split()))
    yield from same_topic(groups, random.Random(SEED))


def clinc150(folder: Path) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for text, intent in json.loads((folder / "clinc150/data_full.json").read_text())["train"]:
        groups.setdefault(intent, []).append(text)
    yield from same_topic(groups, random.Random(SEED))


def multidogo(folder: Path) -> Iterator[str]:
    for domain in ("fastfood", "insurance", "media"):
        turns: dict[str, list[str]] = {}
        with (folder / f"multidogo/{domain}/train.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                if row["utterance"]:  # a few rows are cut short
                    turns.setdefault(row["conversationId"], []).append(row["utterance"])
        yield from ("\n".join(lines) + "\n" for lines in turns.values())


def books(folder: Path) -> Iterator[str]:
    for name, share in (("war-and-peace", 0.35), ("ben_franklin_autobiography_start", 1.0)):
        text = (folder / f"text/{name}.txt").read_text(encoding="utf-8").replace("\r\n", "\n")
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip()]
        for start in range(0, int(len(paragraphs) * share), 6):
            yield "\n".join(paragraphs[start : start + 6]) + "\n"


CORPORA = {  # name: (documents, licence)
    "gsm8k": (gsm8k, "MIT"),
    "self_instruct": (self_instruct, "Apache-2.0"),
    "banking77 (train)": (banking77, "CC-BY-4.0, Casanueva et al. 2020"),
    "clinc150 (train)": (clinc150, "CC-BY-3.0, Larson et al. 2019"),
    "multidogo": (multidogo, "CDLA-Permissive-1.0"),
    "books": (books, "public domain: War and Peace (first 35 %), Franklin's autobiography (start)"),
}


def read_documents(folder: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """Training and held-out documents, and the bytes of each corpus. The side depends on the text alone."""
    train, held_out, sizes = [], [], {}
    for name, (documents, _) in CORPORA.items():
        unique = list(dict.fromkeys(documents(folder)))
        sizes[name] = sum(len(text.encode()) for text in unique)
        for text in unique:
            side = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
            (held_out if side < HELD_OUT_PERCENT else train).append(text)
    return train, held_out, sizes


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, so numbers are spelt the same everywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents in one row of ids (uint16), each ended by END_OF_TEXT."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids += [*encoding.ids, 0]
    return np.array(ids, dtype=np.uint16)


def windows(stream: np.ndarray, length: int) -> np.ndarray:
    """Consecutive windows (N, length + 1); each shares one token with the next."""
    count = (len(stream) - 1) // length
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length][:count]


def loss_fn(model: nn.Module, rows: mx.array) -> mx.array:
    """Mean cross-entropy in nats per token of rows (B, T + 1)."""
    return nn.losses.cross_entropy(model(rows[:, :-1]), rows[:, 1:], reduction="mean")


def held_out_loss(model: nn.Module, rows: np.ndarray) -> float:
    losses = [
        float(loss_fn(model, mx.array(part.astype(np.int32)))) * len(part)
        for part in (rows[i : i + 16] for i in range(0, len(rows), 16))
    ]
    return sum(losses) / len(rows)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 2 %, then cosine to 2 % of it."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def initial(path: str, weight: mx.array) -> mx.array:
    """Normal initial weights; what writes to the residual stream starts smaller, by the square root of its writers."""
    if weight.ndim < 2:
        return weight
    writers = 2 * CONFIG["num_hidden_layers"] if path.endswith(("o_proj.weight", "down_proj.weight")) else 1
    return mx.random.normal(weight.shape) * (0.05 / math.sqrt(writers))


def train(args: argparse.Namespace) -> None:
    documents, held_out_documents, sizes = read_documents(args.text)
    random.Random(SEED).shuffle(documents)
    tokenizer = train_tokenizer(documents)
    held_out = windows(token_stream(tokenizer, held_out_documents), args.length)
    print(f"{len(documents)} documents, {sum(sizes.values()) / 1e6:.1f} MB, {len(held_out)} held-out windows")

    mx.random.seed(SEED)
    model = Model(ModelArgs.from_dict(CONFIG))
    model.update(tree_map_with_path(initial, model.parameters()))
    optimizer = optim.AdamW(
        learning_rate=args.learning_rate, betas=[0.9, 0.95], weight_decay=0.05, bias_correction=True
    )
    value_and_grad = nn.value_and_grad(model, loss_fn)

    curve: list[dict] = []
    epoch, rows = 0, iter(())
    started, running = time.monotonic(), None
    for step in range(args.steps):
        batch = [row for _, row in zip(range(args.batch), rows, strict=False)]
        if len(batch) < args.batch:  # a new epoch: documents in a new order, so windows differ too
            order = random.Random(SEED + epoch).sample(documents, len(documents))
            shuffled = windows(token_stream(tokenizer, order), args.length)
            rows = iter(shuffled[np.random.default_rng(SEED + epoch).permutation(len(shuffled))])
            epoch += 1
            batch += [row for _, row in zip(range(args.batch - len(batch)), rows, strict=False)]
        optimizer.learning_rate = mx.array(args.learning_rate * schedule(step, args.steps))
        loss, gradient = value_and_grad(model, mx.array(np.stack(batch).astype(np.int32)))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(loss, model.parameters(), optimizer.state)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            valid = held_out_loss(model, held_out)
            spent = time.monotonic() - started
            curve.append({"step": step + 1, "train_loss": round(running, 4), "held_out_loss": round(valid, 4)})
            left = spent / (step + 1) * (args.steps - step - 1)
            print(
                f"step {step + 1}/{args.steps} train {running:.3f} held-out {valid:.3f} {left / 60:.0f} min left",
                flush=True,
            )
            save(args, model, tokenizer, {"curve": curve, "corpora_bytes": sizes, "epochs": epoch})


def save(args: argparse.Namespace, model: nn.Module, tokenizer: Tokenizer, figures: dict) -> None:
    """Writes the Hugging Face folder and `training.json`, the figures that the model card shows."""
    args.out.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(args.out / "model.safetensors"), weights, metadata={"format": "pt"})
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_json(args.out / "config.json", CONFIG)
    write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONFIG["max_position_embeddings"],
            "bos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "eos_token": TURN_END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    figures = {
        "parameters": sum(w.size for w in weights.values()),
        "steps": args.steps,
        "tokens_per_step": args.batch * args.length,
        **figures,
    }
    write_json(args.out / "training.json", figures)
    points = [
        {"step": p["step"], "train_loss": p["train_loss"], "valid_loss": p["held_out_loss"]} for p in figures["curve"]
    ]
    picture = chart.loss_curve(points, None).replace(
        ">", f' xmlns="http://www.w3.org/2000/svg"><style>{COLOURS}{chart.STYLE}</style>', 1
    )
    (args.out / "training.svg").write_text(picture + "\n", encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak learning rate of AdamW")
    parser.add_argument("--report-every", type=int, default=100, help="steps between held-out losses")
    train(parser.parse_args())

"""Checks masks on random chats against templates written out by hand, mlxtune's and mlx-lm's side by side.

    python scripts/bench_masks.py [--tokenizers FOLDER_OF_TOKENIZER_FOLDERS] [--rows 2000] [--seed 0] [--json]

Each template is spelt out here a second time, as plain Python that says which characters are learned; a token is to be
learned if it starts inside them. For mlxtune, a row is right if its samples have exactly the tokens that a model would
be asked with and would have to say. mlx-lm makes one sequence of a row; it is right if the tokens it learns are exactly
the answers and their ends in that sequence.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mlxtune.data.files import Row
from mlxtune.data.formats import Chat
from mlxtune.data.render import Limit, Sample, render
from mlxtune.errors import DataError
from mlxtune.recipe import DataRecipe
from mlxtune.tokenizer import PLAIN_TEMPLATE

Message = dict[str, Any]
Piece = tuple[str, bool]  # a text, and whether it is learned
TINY = Path(__file__).parents[1] / "mlxtune" / "assets" / "tiny"

# In the manner of DeepSeek-R1: the prompt opens a thought, and the history has none.
R1 = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
# In the manner of Qwen3: the last answer stands behind its thought, which may be empty; earlier ones lose theirs.
QWEN3 = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>
{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}
</think>

{% endif %}{{ parts[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# In the manner of Llama 3: headings in control tokens, contents trimmed.
LLAMA3 = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
# In the manner of Gemma: another name for the assistant, the system prompt inside the first question; and the answers
# marked for transformers.
GEMMA = """{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<end_of_turn>{% endgeneration %}{{ '\n' }}
{%- else %}{{ system if loop.first else '' }}{{ m.content | trim }}<end_of_turn>
{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def answers(messages: list[Message]) -> list[int]:
    return [place for place, each in enumerate(messages) if each["role"] == "assistant" and each.get("weight") != 0]


def one_text(turn: Callable[[Message, int], list[Piece]]) -> Callable[[list[Message]], list[list[Piece]]]:
    """A template whose whole text has every answer as it is asked for: one sample, turn by turn."""
    return lambda messages: [[piece for place, each in enumerate(messages) for piece in turn(each, place)]]


def chatml(messages: list[Message], default: str = "") -> list[list[Piece]]:
    pieces: list[Piece] = []
    if default and messages[0]["role"] != "system":
        pieces.append((f"<|im_start|>system\n{default}<|im_end|>\n", False))
    for place, each in enumerate(messages):
        pieces.append((f"<|im_start|>{each['role']}\n", False))
        pieces.append((f"{each['content']}<|im_end|>", place in answers(messages)))
        pieces.append(("\n", False))
    return [pieces]


def phi(messages: list[Message]) -> list[list[Piece]]:
    pieces: list[Piece] = []
    for place, each in enumerate(messages):
        pieces += [(f"<|{each['role']}|>\n", False), (f"{each['content']}<|end|>", place in answers(messages))]
        pieces.append(("\n", False))
    return [[*pieces, ("<|endoftext|>", False)]]


def plain(messages: list[Message]) -> list[list[Piece]]:
    pieces: list[Piece] = [("<|endoftext|>", False)]
    for place, each in enumerate(messages):
        pieces.append((f"### {each['role'].capitalize()}:\n", False))
        end = "<|im_end|>" if each["role"] == "assistant" else ""
        pieces += [(f"{each['content']}{end}", place in answers(messages)), ("\n\n", False)]
    return [pieces]


def llama3(messages: list[Message]) -> list[list[Piece]]:
    pieces: list[Piece] = [("<|endoftext|>", False)]
    for place, each in enumerate(messages):
        pieces.append((f"<|start_header_id|>{each['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{each['content'].strip()}<|eot_id|>", place in answers(messages)))
    return [pieces]


def gemma(messages: list[Message]) -> list[list[Piece]]:
    pieces: list[Piece] = [("<|endoftext|>", False)]
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    for place, each in enumerate(messages):
        if each["role"] == "user":
            pieces.append((f"<start_of_turn>user\n{system}{each['content'].strip()}<end_of_turn>\n", False))
            system = ""
        elif each["role"] == "assistant":
            learned = place in answers(messages)
            pieces += [("<start_of_turn>model\n", False), (f"{each['content'].strip()}<end_of_turn>", learned)]
            pieces.append(("\n", False))
    return [pieces]


def mistral(messages: list[Message]) -> list[list[Piece]]:
    """The system prompt stands in the question that is asked last: with one, every answer is a sample of its own."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    first = 1 if system is not None else 0

    def asked(upto: int, last: bool) -> list[Piece]:
        pieces: list[Piece] = [("<s>", False)]
        for place in range(first, upto):
            each = messages[place]
            if each["role"] == "user":
                told = f"{system}\n\n" if system is not None and last and place == upto - 1 else ""
                pieces.append((f"[INST] {told}{each['content']}[/INST]", False))
            else:
                pieces.append((f" {each['content'].strip()}</s>", not last and place in answers(messages)))
        return pieces

    if system is None:
        return [asked(len(messages), last=False)]
    return [[*asked(place, True), (f" {messages[place]['content'].strip()}</s>", True)] for place in answers(messages)]


def r1(messages: list[Message]) -> list[list[Piece]]:
    """Every answer is a sample of its own: what is asked with opens the thought, and the history has none."""
    samples = []
    for place in answers(messages):
        pieces: list[Piece] = []
        for each in messages[:place]:
            content = each["content"].split("</think>")[-1] if each["role"] == "assistant" else each["content"]
            pieces.append((f"<|im_start|>{each['role']}\n{content}<|im_end|>\n", False))
        pieces.append(("<|im_start|>assistant\n<think>\n", False))
        pieces.append((messages[place]["content"].removeprefix("<think>\n") + "<|im_end|>", True))
        samples.append([*pieces, ("\n", False)])
    return samples


def qwen3(messages: list[Message]) -> list[list[Piece]]:
    """Only the last answer stands in the whole text behind a thought, as it is asked for."""
    samples = []
    for place in answers(messages):
        pieces: list[Piece] = []
        for each in messages[:place]:
            content = each["content"]
            if each["role"] == "assistant":
                content = content.split("</think>")[-1].lstrip("\n")
            pieces.append((f"<|im_start|>{each['role']}\n{content}<|im_end|>\n", False))
        pieces.append(("<|im_start|>assistant\n", False))
        parts = messages[place]["content"].split("</think>")
        thought = parts[0].split("<think>")[-1].strip() if len(parts) > 1 else ""
        head = f"<think>\n{thought}\n</think>\n\n"
        pieces.append((head, bool(thought)))
        pieces.append((parts[-1].lstrip("\n") + "<|im_end|>", True))
        samples.append([*pieces, ("\n", False)])
    return samples


QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class Case:
    """A template on a tokenizer, the same by hand, and the kind of thoughts that its answers hold."""

    tokenizer: Any
    by_hand: Callable[[list[Message]], list[list[Piece]]]
    thoughts: str = "none"  # none, all or some


def own(template: str, specials: list[str]) -> Any:
    """The embedded tokenizer with another template, and the control tokens that it writes."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": "<|endoftext|>"})
    tokenizer.chat_template = template
    return tokenizer


def cases(folder: Path | None) -> dict[str, Case]:
    """Every template by name: six that need nothing, and four real ones where their tokenizers are."""
    found = {
        "chatml (embedded)": Case(AutoTokenizer.from_pretrained(TINY), chatml),
        "plain": Case(own(PLAIN_TEMPLATE, []), plain),
        "R1 style": Case(own(R1, []), r1, "all"),
        "Qwen3 style": Case(own(QWEN3, []), qwen3, "some"),
        "Llama 3 style": Case(own(LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]), llama3),
        "Gemma style": Case(own(GEMMA, ["<start_of_turn>", "<end_of_turn>"]), gemma),
    }
    if folder is not None:
        real = {
            "qwen2.5-0.5b-instruct": lambda messages: chatml(messages, QWEN_SYSTEM),
            "smollm2-135m-instruct": lambda messages: chatml(messages, SMOL_SYSTEM),
            "mistral-v3": mistral,
            "ort-phi-3-mini": phi,
        }
        found |= {name: Case(AutoTokenizer.from_pretrained(folder / name), by_hand) for name, by_hand in real.items()}
    return found


WORDS = [
    *["card", "parcel", "Grüße", "你好", "🙂", "e\u0301", "refund", "42", "don't", "3.50€", "naïve", "مرحبا"],
    *["👩\u200d👩\u200d👧", "ﬁ", "½", "a\u200db", "\u00a0"],
]
TRAPS = ["### Assistant:", "<|im_end", "[/INST", "</s", "assistant\n", "{{ x }}", "\n\n", "<b>", "Human:", "\t", " "]


def text(draw: random.Random) -> str:
    parts = [draw.choice(TRAPS) if draw.random() < 0.2 else draw.choice(WORDS) for _ in range(draw.randint(1, 6))]
    return draw.choice(["", "", " ", "\n"]) + draw.choice([" ", "", "\n"]).join(parts) + draw.choice(["", "", "\n"])


def chats(count: int, seed: int, thoughts: str) -> Iterator[list[Message]]:
    """Random chats of one to four turns, some with a system prompt, an answer of weight 0, or thoughts."""
    draw = random.Random(seed)
    for _ in range(count):
        messages: list[Message] = [{"role": "system", "content": text(draw)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 4)):
            answer = text(draw)
            while not answer.strip():
                answer = text(draw)
            if thoughts == "all" or (thoughts == "some" and draw.random() < 0.5):
                thought = text(draw).strip() or "hm"
                answer = f"<think>\n{thought}\n</think>\n\n{answer.strip()}"
            messages += [{"role": "user", "content": text(draw)}, {"role": "assistant", "content": answer}]
            if draw.random() < 0.15:
                messages[-1]["weight"] = 0
        if answers(messages):
            yield messages


def expected(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """The tokens of the pieces' text, and which of them start inside a learned piece."""
    whole = "".join(part for part, _ in pieces)
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside, place = [], 0
    for part, learned in pieces:
        if learned:
            inside.append((place, place + len(part)))
        place += len(part)
    trained = [any(low <= begin < high for low, high in inside) for begin, _ in encoding["offset_mapping"]]
    return encoding["input_ids"], trained


def expected_samples(tokenizer: Any, pieces: list[Piece]) -> Iterator[tuple[list[int], list[bool]]]:
    """What a text by hand is to become: one sample, but for answers whose start the tokenizer merges with the prompt.

    Such an answer is asked for with the prompt's own tokens, so it is a sample of its own: they, then the answer's.
    """
    whole = tokenizer.encode("".join(part for part, _ in pieces), add_special_tokens=False)
    kept: list[Piece] = []
    for part, learned in pieces:
        before = "".join(text for text, _ in pieces[: len(kept)])
        prompt = tokenizer.encode(before, add_special_tokens=False) if learned else []
        if learned and whole[: len(prompt)] != prompt:
            answer = tokenizer.encode(part, add_special_tokens=False)
            yield prompt + answer, [False] * len(prompt) + [True] * len(answer)
            learned = False
        kept.append((part, learned))
    if any(learned for _, learned in kept):
        yield expected(tokenizer, kept)


def wrong_tokens(tokenizer: Any, samples: list[Sample], by_hand: list[list[Piece]]) -> int:
    """Tokens that are wrongly learned or left out; all of a row's where its tokens are not those by hand."""
    wanted = [each for pieces in by_hand for each in expected_samples(tokenizer, pieces)]
    if len(samples) != len(wanted):
        return sum(len(tokens) for tokens, _ in wanted)
    left, wrong = list(samples), 0
    for tokens, trained in wanted:
        # of what stands behind the last learned token, only that it is not learned
        match = next((each for each in left if each.tokens[: len(tokens)] == tokens), None)
        if match is None:
            return sum(len(tokens) for tokens, _ in wanted)
        left.remove(match)
        wrong += sum(a != b for a, b in zip(trained, match.trained, strict=False)) + sum(match.trained[len(tokens) :])
    return wrong


def mlx_lm_wrong(tokenizer: Any, messages: list[Message]) -> int:
    """Tokens that mlx-lm's `--mask-prompt` learns wrongly or not, against the answers and ends in its own sequence."""
    from mlx_lm.tuner.datasets import ChatDataset

    row = {"messages": [{name: each[name] for name in ("role", "content")} for each in messages]}
    tokens, offset = ChatDataset([row], tokenizer, mask_prompt=True).process(row)
    # its answers as characters: the texts between a question's end and the end of turn, from the template's own marks
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoding["input_ids"]) != list(tokens):
        return len(tokens)
    spans, place = [], 0
    for number, each in enumerate(messages):
        content = each["content"].split("</think>")[-1].strip()
        start = text.find(content, place)
        end = start + len(content)
        if each["role"] == "assistant" and number in answers(messages):
            spans.append((start, end))
        place = end
    found = [index >= offset for index in range(len(tokens))]
    wanted = [any(low <= begin < high for low, high in spans) for begin, _ in encoding["offset_mapping"]]
    # ends of turns and white space around answers count for neither side
    return sum(a and not b for a, b in zip(wanted, found, strict=True))


def check(case: Case, count: int, seed: int, peer: bool) -> dict[str, Any]:
    """Rows, refused rows by reason, wrong rows and wrong tokens of one template."""
    reasons: Counter[str] = Counter()
    figures = {"rows": 0, "tokens": 0, "wrong_rows": 0, "wrong_tokens": 0, "mlx_lm_wrong_rows": 0}
    ends = {case.tokenizer.eos_token_id}
    for number, messages in enumerate(chats(count, seed, case.thoughts), start=1):
        row = Row("chats.jsonl", number, {})
        try:
            rendered = render([(row, Chat(messages))], case.tokenizer, ends, DataRecipe(), Limit(100_000))
        except DataError as error:
            reasons[error.what.split(": ", 1)[-1].split(",")[0]] += 1
            continue
        wrong = wrong_tokens(case.tokenizer, rendered.samples, case.by_hand(messages))
        figures["rows"] += 1
        figures["tokens"] += sum(len(sample.tokens) for sample in rendered.samples)
        figures["wrong_tokens"] += wrong
        figures["wrong_rows"] += wrong > 0
        if peer:
            figures["mlx_lm_wrong_rows"] += mlx_lm_wrong(case.tokenizer, messages) > 0
    return {**figures, "refused": dict(reasons)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", type=Path, help="folder of qwen2.5-0.5b-instruct, mistral-v3, …")
    parser.add_argument("--rows", type=int, default=2000, help="random chats a template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {}
    for name, case in cases(args.tokenizers).items():
        found[name] = check(case, args.rows, args.seed, peer=True)
        print(f"{name}: {found[name]}", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{'template':<24}{'rows':>8}{'tokens':>10}{'wrong tokens':>14}{'refused':>9}{'mlx-lm wrong rows':>19}")
    for name, each in found.items():
        refused = sum(each["refused"].values())
        print(
            f"{name:<24}{each['rows']:>8}{each['tokens']:>10}{each['wrong_tokens']:>14}{refused:>9}"
            f"{each['mlx_lm_wrong_rows']:>19}"
        )


if __name__ == "__main__":
    main()

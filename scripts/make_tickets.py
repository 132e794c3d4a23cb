"""Writes the embedded data set: support tickets of an invented web shop, with the noise that real files have.

    python scripts/make_tickets.py --out mlxtune/assets/tickets.jsonl

The wordings are in `tickets.txt`; this script fills them in. The same seed gives the same file, byte for byte.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlxtune.data.similar import jaccard, normalise, shingles

MATERIAL = Path(__file__).with_name("tickets.txt")
OUT = Path(__file__).parents[1] / "mlxtune" / "assets" / "tickets.jsonl"

ROWS_PER_SCENARIO = (2, 3, 3, 3, 4)
NEAR_DUPLICATES, DUPLICATES, CONTRADICTIONS = 24, 6, 7
TYPOS, CARELESS, CONTACTS, ORDER_NUMBERS = 0.1, 0.12, 0.04, 0.6
QUESTIONS, QUESTION_FIRST = 0.4, 0.25
LONGEST, SHORTEST = 30, 8  # words

OPENINGS = ["Hi,", "Hello,", "Hey,", "Good morning,", "Hi Harbor,", "Hello Harbor team,", "Hi there,", "Good evening,"]
CLOSINGS = ["Thanks.", "Thank you.", "Thanks a lot.", "Best wishes."]
CONTACTS_BY = ["You can reach me at {mail}.", "My e-mail is {mail}.", "Call me at {phone}.", "My phone is {phone}."]
ITEMS = [
    *("kettle", "desk lamp", "backpack", "rain jacket", "coffee grinder", "wool blanket", "yoga mat", "phone case"),
    *("bread knife", "tent", "wall clock", "floor lamp", "board game", "toaster", "bike lock", "cutting board"),
    *("water bottle", "suitcase", "soup pot", "bath mat", "hair dryer", "picture frame", "lunch box", "sleeping bag"),
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
SPANS = ["three days", "four days", "five days", "six days", "a week", "eight days", "ten days", "two weeks"]
STREETS = ["Mill Lane", "Oak Street", "Station Road", "Garden Street", "Hill Road", "Canal Street", "Park Lane"]
ORDERS = ["order {number}", "order #{number}", "order no. {number}"]
# whom a hurried colleague might have mistaken a ticket for
CONFUSED = {
    "late_delivery": "refund_request",
    "refund_request": "cancel_order",
    "damaged_item": "refund_request",
    "wrong_item": "damaged_item",
    "cancel_order": "refund_request",
    "change_address": "late_delivery",
    "payment_failed": "refund_request",
}


@dataclass
class Intent:
    """A label with its two replies, its follow-up questions, and its scenarios of several wordings each."""

    name: str
    reply: str = ""
    reply_without_number: str = ""
    questions: list[str] = field(default_factory=list)
    scenarios: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Ticket:
    """One row before it is written; `numbered`: it names an order number, which decides the reply."""

    text: str
    intent: str
    scenario: str
    numbered: bool


def read_material(path: Path) -> dict[str, Intent]:
    """The intents of `tickets.txt`, which explains its format."""
    intents: dict[str, Intent] = {}
    intent = Intent("")
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line and not line.startswith("#")]
        if lines and lines[0].startswith("="):
            intent = intents[lines[0][2:]] = Intent(lines[0][2:], lines[1][2:], lines[2][2:])
            intent.questions = [line[2:] for line in lines[3:]]
        elif lines:
            intent.scenarios.append(lines)
    return intents


def fill(wording: str, rng: random.Random) -> str:
    """A wording with its slots filled in."""
    numbered = rng.random() < ORDER_NUMBERS
    order = rng.choice(ORDERS).format(number=rng.randint(10000, 99999)) if numbered else "my order"
    slots = {
        "order": order,
        "tag": f", {order}" if numbered else "",
        "item": rng.choice(ITEMS),
        "day": rng.choice(DAYS),
        "days": rng.choice(SPANS),
        "street": rng.choice(STREETS),
    }
    return re.sub(r"{([^}]+)}", lambda slot: slots.get(slot[1], rng.choice(slot[1].split("|"))), wording)


def compose(core: str, intent: Intent, rng: random.Random) -> str:
    """A ticket around a filled wording: an opening, a question, a closing, as far as chance and the length allow."""
    parts = [core]
    if rng.random() < QUESTIONS or len(core.split()) < SHORTEST:
        question = rng.choice([each for each in intent.questions if normalise(each) not in normalise(core)])
        first = rng.random() < QUESTION_FIRST and len(f"{question} {core}".split()) <= LONGEST
        parts = [question, core] if first else [core, question]
    if rng.random() < CONTACTS:
        mail, phone = f"customer{rng.randint(10, 999)}@example.com", f"555-01{rng.randint(10, 99)}"
        parts.append(rng.choice(CONTACTS_BY).format(mail=mail, phone=phone))
    if rng.random() < 0.15:
        parts.append(rng.choice(CLOSINGS))
    if rng.random() < 0.5:
        parts = greeted(parts, rng)
    while len(" ".join(parts).split()) > LONGEST:
        parts.pop(0 if parts[0] in OPENINGS else -1)
    text = " ".join(parts)
    return re.sub(r"(^|[.?!] )([a-z])", lambda start: start[1] + start[2].upper(), text)


def greeted(parts: list[str], rng: random.Random) -> list[str]:
    """The parts of a ticket behind a greeting; the sentence goes on in lower case, except for `I` and names."""
    first = parts[0].split()[0]
    keep = first in ("I", "VAT", "PDF") or first in DAYS
    return [rng.choice(OPENINGS), parts[0] if keep else parts[0][0].lower() + parts[0][1:], *parts[1:]]


def is_greeted(text: str) -> bool:
    return normalise(text).startswith(tuple(f"{normalise(opening)} " for opening in OPENINGS))


def is_closed(text: str) -> bool:
    return normalise(text).endswith(tuple(normalise(closing) for closing in CLOSINGS))


def with_typos(text: str, rng: random.Random) -> str:
    """The text with one or two words mistyped: letters swapped, one left out, or one doubled."""
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    for place in rng.sample(long, min(len(long), rng.randint(1, 2))):
        word, at = words[place], rng.randint(1, len(words[place]) - 3)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        words[place] = rng.choice([swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]])
    return " ".join(words)


def careless(text: str) -> str:
    """The text as it is typed on a phone in a hurry: lower case and without punctuation."""
    return re.sub(r"[.,?](?= |$)", "", text).lower()


def with_noise(text: str, rng: random.Random) -> str:
    if rng.random() < TYPOS:
        text = with_typos(text, rng)
    return careless(text) if rng.random() < CARELESS and "example.com" not in text else text


def similarity(a: str, b: str) -> float:
    return jaccard(shingles(a), shingles(b))


def write_scenario(intent: Intent, number: int, rng: random.Random) -> list[Ticket]:
    """The tickets of one scenario: each wording once, then more of them, none nearly the same as another."""
    wordings = list(intent.scenarios[number])
    rng.shuffle(wordings)
    tickets: list[Ticket] = []
    wanted = rng.choice(ROWS_PER_SCENARIO)
    while len(tickets) < wanted:
        core = fill(wordings[len(tickets) % len(wordings)], rng)
        text = with_noise(compose(core, intent, rng), rng)
        if all(similarity(text, other.text) < 0.75 for other in tickets):
            name = f"{intent.name}-{number + 1:02d}"
            tickets.append(Ticket(text, intent.name, name, re.search(r"\b\d{5}\b", text) is not None))
    return tickets


def nearly(ticket: Ticket, rng: random.Random) -> Ticket:
    """The ticket written again with another order number, greeting or typing: close to the first, not equal."""
    ways: list[Callable[[str], str]] = [
        lambda text: re.sub(r"\b\d{5}\b", str(rng.randint(10000, 99999)), text),
        lambda text: with_typos(text, rng),
        lambda text: text if is_closed(text) else f"{text} {rng.choice(CLOSINGS)}",
        lambda text: text if is_greeted(text) else " ".join(greeted([text], rng)),
    ]
    while True:
        text = rng.choice(ways)(ticket.text)
        alike = similarity(text, ticket.text) >= 0.8
        if alike and normalise(text) != normalise(ticket.text) and SHORTEST <= len(text.split()) <= LONGEST:
            return replace(ticket, text=text)


def make_tickets(seed: int) -> tuple[list[Ticket], dict[str, Intent]]:
    """All tickets in shuffled order, and the intents that they come from."""
    rng = random.Random(seed)
    intents = read_material(MATERIAL)
    tickets = [
        ticket
        for intent in intents.values()
        for number in range(len(intent.scenarios))
        for ticket in write_scenario(intent, number, rng)
    ]
    # the others leave `nearly` too little to change
    changeable = [ticket for ticket in tickets if ticket.numbered or not is_closed(ticket.text)]
    originals = rng.sample(changeable, NEAR_DUPLICATES + DUPLICATES)
    copies = [nearly(ticket, rng) for ticket in originals[DUPLICATES:]] + originals[:DUPLICATES]
    confusable = [ticket for ticket in changeable if ticket not in originals and ticket.intent in CONFUSED]
    mistaken = rng.sample(confusable, CONTRADICTIONS)
    for number, ticket in enumerate(mistaken):  # every other one word for word
        copies.append(replace(nearly(ticket, rng) if number % 2 else ticket, intent=CONFUSED[ticket.intent]))
    tickets += copies
    rng.shuffle(tickets)
    return tickets, intents


def to_line(ticket: Ticket, intents: dict[str, Intent]) -> str:
    """One line of the file: a chat whose answer is the label, then a reply in the house style."""
    intent = intents[ticket.intent]
    reply = intent.reply if ticket.numbered else intent.reply_without_number
    messages = [
        {"role": "user", "content": ticket.text},
        {"role": "assistant", "content": f"{ticket.intent}\n{reply}"},
    ]
    return json.dumps({"messages": messages, "cluster": ticket.scenario}, ensure_ascii=False)


def render(seed: int) -> str:
    """The whole file."""
    tickets, intents = make_tickets(seed)
    return "".join(to_line(ticket, intents) + "\n" for ticket in tickets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write")
    args = parser.parse_args()
    args.out.write_text(render(args.seed), encoding="utf-8")

"""A conversation with a model: what was said, and the cache that lets each turn feed only what is new.

Knows messages and turns, not terminals, commands or how tokens are chosen.
"""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path

from mlxtune import generate, model, rundir
from mlxtune.errors import InputError, OutputError
from mlxtune.generate import Piece
from mlxtune.model import LanguageModel
from mlxtune.tokenizer import load_tokenizer

Message = dict[str, str]
FULL = "start again with /clear, or take turns back with /undo"


def check(path: Path) -> None:
    """Raises ModelError for a model folder that cannot chat. Reads no weights."""
    config = model.check(path)
    settings = path / "tokenizer_config.json"
    # a large tokenizer takes seconds to load, so it is asked only where no file speaks of a template
    promised = (
        (path / "chat_template.jinja").is_file()
        or (path / "chat_template.json").is_file()
        or (settings.is_file() and b"chat_template" in settings.read_bytes())
    )
    if not promised and not load_tokenizer(path, config).has_chat_template:
        raise generate.no_chat_template(path)


class Conversation:
    """What was said so far, and the model's cache of it.

    The cache is never trusted to be the history: each turn renders the whole history by the chat template and feeds
    what the cache does not begin with. So whatever was said, taken back or interrupted, an answer is the one that a
    new conversation with the same messages would give.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        system: str | None = None,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        """Raises ModelError if the model has no chat template."""
        if not lm.has_chat_template:
            raise generate.no_chat_template(lm.path)
        self.lm, self.max_tokens, self.temp, self.top_p, self.seed = lm, max_tokens, temp, top_p, seed
        self.cache = generate.Cache(lm)
        self.turns: list[Message] = []  # user and assistant in turn
        self.answered = 0
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """The whole history, system prompt first."""
        return self._with_system(self.turns)

    def say(self, text: str) -> Generator[Piece]:
        """The answer to `text`, piece by piece. A stream closed early leaves what was said so far in the history.

        The turn is part of the history from the first piece on. Raises InputError if the text is empty or the context
        is full, ModelError if the template refuses; the history is then as before.
        """
        if not text.strip():
            raise InputError("there is nothing to say", hint="write a message")
        return self._answer([*self.turns, {"role": "user", "content": text}])

    def retry(self) -> Generator[Piece]:
        """Another answer in place of the last one: a different one unless greedy. Raises InputError as `say` does."""
        if not self.turns:
            raise InputError("there is no answer to retry")
        return self._answer(self.turns[:-1])

    def undo(self) -> str:
        """Takes back the last message and its answer, and returns the message. Raises InputError if there is none."""
        if not self.turns:
            raise InputError("there is nothing to undo")
        said = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        return said

    def clear(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.turns = []

    def set_system(self, text: str | None) -> None:
        """Sets the system prompt, or removes it (None or blank). The turns stay."""
        self.system = text if text and text.strip() else None

    def save(self, path: Path) -> int:
        """Writes the conversation as one row of training data, a `.jsonl` file, and returns the number of its answers.

        A turn without an answer (stopped at once) is left out: a row that teaches an empty answer is refused by the
        data's readers. Raises OutputError if `path` exists or is no `.jsonl`, InputError if there is no answer.
        """
        if path.suffix != ".jsonl":
            raise OutputError("is not named .jsonl", where=path, hint="name it like talk.jsonl")
        pairs = zip(self.turns[::2], self.turns[1::2], strict=True)
        answered = [pair for pair in pairs if pair[1]["content"].strip()]
        if not answered:
            raise InputError("there is no answer to save yet")
        rundir.refuse_existing(path, "file")
        row = {"messages": self._with_system([message for pair in answered for message in pair])}
        rundir.write_text(path, json.dumps(row, ensure_ascii=False) + "\n")
        return len(answered)

    def _with_system(self, turns: list[Message]) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *(dict(message) for message in turns)]

    def _answer(self, asked: list[Message]) -> Generator[Piece]:
        tokens = generate.prompt_tokens(self.lm, self._with_system(asked))
        max_tokens = generate.room(self.lm, len(tokens), self.max_tokens, FULL)

        def pieces() -> Generator[Piece]:
            answer = {"role": "assistant", "content": ""}
            self.turns = [*asked, answer]
            seed = self.seed + self.answered  # each answer draws anew, and the whole conversation can be repeated
            self.answered += 1
            with contextlib.closing(
                generate.stream(
                    self.lm,
                    tokens,
                    max_tokens=max_tokens,
                    temp=self.temp,
                    top_p=self.top_p,
                    seed=seed,
                    cache=self.cache,
                )
            ) as stream:
                for piece in stream:
                    answer["content"] += piece.text
                    yield piece

        return pieces()

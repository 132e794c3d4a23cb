"""Tokenizers of model folders: load one, give it a chat template, find the token that ends a turn.

Knows tokenizer files and templates, not weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub.errors import StrictDataclassError

from mlxtune import borrow
from mlxtune.borrow import TokenizerWrapper
from mlxtune.errors import ModelError, TrustError
from mlxtune.rundir import read_json

# The template of models that bring none. The line break behind a heading keeps heading and text in tokens apart.
PLAIN_TEMPLATE = """{{ bos_token or '' }}{% for message in messages %}### {{ message.role | capitalize }}:
{{ message.content }}{{ eos_token if message.role == 'assistant' else '' }}

{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""

# What mlx-lm and transformers raise for files that do not say what they should.
MALFORMED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    StrictDataclassError, TypeError, ValueError,
)  # fmt: skip


PREFIX_AND_MERGES = ("continuing_subword_prefix", "merges")
PREFIXED = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')

# What a template raises that is wrong for every conversation, not only for one that it refuses.
BROKEN_TEMPLATE = (jinja2.TemplateSyntaxError, ArithmeticError, AttributeError, MemoryError, RecursionError)


def load_tokenizer(path: Path, config: dict[str, Any], chat_template: str | None = None) -> TokenizerWrapper:
    """The tokenizer of a model folder, with another chat template where one is given.

    Raises ModelError for a malformed one, TrustError for one that asks to run its own code.
    """
    generation = path / "generation_config.json"
    settings = {"eos_token_id": config.get("eos_token_id")}
    if generation.is_file():
        own = read_json(generation)
        settings |= own if isinstance(own, dict) else {}
    ends = settings["eos_token_id"]
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise ModelError(f"has the eos_token_id {ends!r}, not token numbers", where=path)
    _check_template_files(path)
    _check_merges(path / "tokenizer.json")
    try:
        # without this word transformers asks at the terminal whether to run the code
        tokenizer = borrow.load_tokenizer(path, {"trust_remote_code": False}, eos_token_ids=ends)
    except BaseException as error:
        if "trust_remote_code" in str(error):
            raise TrustError(
                "has a tokenizer that asks to run its own code",
                where=path,
                hint="mlxtune runs no code from model folders",
            ) from None
        # all that the tokenizers library raises is a bare Exception, or Rust's panic, which is none
        if isinstance(error, MALFORMED) or type(error) is Exception or type(error).__name__ == "PanicException":
            raise ModelError(
                f"has a tokenizer or config that does not load: {brief(error)}",
                where=path,
                hint="download the model again",
            ) from None
        raise
    use_template(tokenizer, chat_template, path)
    return tokenizer


def inner(tokenizer: TokenizerWrapper) -> Any:
    """The tokenizer of transformers inside mlx-lm's wrapper: for offsets, control tokens and templates."""
    return tokenizer._tokenizer


def load_for_rows(
    path: Path, config: dict[str, Any], chat_template: str | None = None
) -> tuple[TokenizerWrapper, str | None]:
    """The tokenizer to render rows with, and the template that it has in place of the model's own, or None.

    A model without a template gets the plain one: what is trained, scored and chatted with then agree.
    """
    tokenizer = load_tokenizer(path, config, chat_template)
    if tokenizer.has_chat_template:
        return tokenizer, chat_template
    use_template(tokenizer, PLAIN_TEMPLATE)
    return tokenizer, PLAIN_TEMPLATE


def use_template(tokenizer: TokenizerWrapper, chat_template: str | None, where: Path | None = None) -> None:
    """Gives `tokenizer` a chat template, or leaves its own if None; the token that ends a turn ends an answer too.

    Raises ModelError for a template that no conversation can be written with; `where` is what it belongs to.
    """
    plain = inner(tokenizer)
    if chat_template is not None:
        plain.chat_template = chat_template
        tokenizer.has_chat_template = True
    try:
        end = _end_of_turn(plain)
    except BROKEN_TEMPLATE as error:
        raise ModelError(
            f"has a chat template that does not render: {brief(error)}",
            where=where,
            hint="put the model's original template in its place",
        ) from None
    except MALFORMED as error:
        raise ModelError(
            f"has a tokenizer or config that does not load: {brief(error)}",
            where=where,
            hint="download the model again",
        ) from None
    if end is not None:
        tokenizer.eos_token_ids = {*tokenizer.eos_token_ids, end}


def _end_of_turn(tokenizer: Any) -> int | None:
    """The control token that the chat template writes behind an answer, or None where there is none.

    Raises one of BROKEN_TEMPLATE.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return None
    answer = "mlxtune"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except BROKEN_TEMPLATE:
        raise
    except (jinja2.TemplateError, LookupError, ValueError, TypeError):
        return None
    stop = text.rfind(answer) + len(answer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    controls = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token, (begin, _) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if begin >= stop and token in controls:
            return int(token) if not text[stop:begin].strip() else None
    return None


def write_template(folder: Path, chat_template: str, ends: set[int]) -> None:
    """Makes `chat_template` and the end tokens those of the saved model in `folder`."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    _change_json(folder / "tokenizer_config.json", {"chat_template": chat_template})
    _change_json(folder / "config.json", {"eos_token_id": sorted(ends)})
    if (folder / "generation_config.json").is_file():
        _change_json(folder / "generation_config.json", {"eos_token_id": sorted(ends)})


def _change_json(file: Path, changes: dict[str, Any]) -> None:
    value = read_json(file) if file.is_file() else {}
    file.write_text(json.dumps(value | changes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def vocabulary(config: dict[str, Any]) -> Any:
    """The number of embeddings that a config names, of the text model in one for more than text, or None."""
    text = config.get("text_config")
    return config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)


def check_vocabulary(tokenizer: TokenizerWrapper, embeddings: Any, path: Path) -> None:
    """Refuses tokens without an embedding. A control token that no conversation writes may lack one, as in Gemma 3.

    Raises ModelError.
    """
    if not isinstance(embeddings, int):
        return
    written = str(tokenizer.chat_template)
    lacking = [
        str(token)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token_id >= embeddings
        and (not token.special or str(token) in written or token_id in tokenizer.eos_token_ids)
    ]
    if lacking or tokenizer.vocab_size > embeddings:
        raise ModelError(
            f"has a tokenizer of {len(tokenizer)} tokens for {embeddings} embeddings",
            where=path,
            hint="they belong to different models",
        )
    added = set(tokenizer.added_tokens_decoder)
    largest = max((number for number in tokenizer.get_vocab().values() if number not in added), default=0)
    for number in (largest, *sorted(tokenizer.eos_token_ids)):
        if not 0 <= number < embeddings:
            raise ModelError(
                f"has the token number {number} for {embeddings} embeddings",
                where=path,
                hint="they belong to different models",
            )


def _check_template_files(path: Path) -> None:
    """Refuses what transformers would take for a template without looking: it may be a text, or named texts."""
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    own = settings.get("chat_template") if isinstance(settings, dict) else None
    named = isinstance(own, list) and all(
        isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
        for each in own
    )
    if not (own is None or isinstance(own, str) or named):
        raise ModelError(
            "has a chat_template that is no text",
            where=path / "tokenizer_config.json",
            hint="put the model's original template in its place",
        )


def _check_merges(file: Path) -> None:
    """Refuses merges without the prefix that the file says they have: the tokenizers library would panic over them."""
    if not file.is_file() or not PREFIXED.search(file.read_bytes()):
        return
    value = read_json(file)
    model = value.get("model") if isinstance(value, dict) else None
    prefix, merges = (model.get(name) for name in PREFIX_AND_MERGES) if isinstance(model, dict) else (None, None)
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(parts, list) and not all(isinstance(part, str) and part.startswith(prefix) for part in parts[1:]):
            raise ModelError(f"has a merge without its prefix {prefix!r}", where=file, hint="download the model again")


def brief(error: BaseException) -> str:
    """An error of a library in a line: some list hundreds of tensors."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]}…"

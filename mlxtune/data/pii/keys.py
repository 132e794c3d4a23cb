"""Secrets: keys and tokens by the prefixes that their issuers document, and passwords where a text assigns them.

Knows forms, not entropy: a secret of no known form, beside no word such as `password`, is not found.
"""

import re
from collections.abc import Iterator

_LONG_WORD = re.compile(r"\S{15}")  # what has none holds no key of a known form
# Each pattern of one issuer, after a boundary.
_ISSUED = re.compile(
    r"(?<![\w-])(?:"
    r"sk-[\w-]{20,200}"  # OpenAI, Anthropic
    r"|[sr]k_(?:live|test)_\w{10,200}|whsec_\w{16,200}"  # Stripe
    r"|gh[oprsu]_\w{30,255}|github_pat_\w{22,255}"  # GitHub
    r"|glpat-[\w-]{20,200}"  # GitLab
    r"|xox[abeoprs]-[\w-]{10,250}|xapp-[\w-]{10,250}"  # Slack
    r"|A(?:KI|SI)A[A-Z2-7]{16}"  # AWS
    r"|AIza[\w-]{35}|ya29\.[\w-]{20,250}"  # Google
    r"|hf_[A-Za-z0-9]{30,60}"  # Hugging Face
    r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,250}"  # npm, PyPI
    r"|SG\.[\w-]{16,40}\.[\w-]{16,80}"  # SendGrid
    r"|\d{8,10}:AA[\w-]{33}"  # Telegram
    r"|eyJ[\w-]{8,2000}\.eyJ[\w-]{8,4000}\.[\w-]{8,2000}"  # JSON Web Token
    r")(?![\w-])"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----[\w+/=:,.\-\s\\]{0,16000}?"
    r"-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
)
# https://name:password@host
_IN_URL = re.compile(r"(?<=://)[^\s/:@\[\]<>{}\"'`]{1,64}:(?P<value>[^\s/@\[\]<>{}\"'`]{1,128})(?=@[\w\[])")
_VALUE = r"(?:(?P<quote>[\"'`])(?P<quoted>[^\s\"'`\[\]]{4,200})(?P=quote)|(?P<bare>[^\s\"'`,;()\[\]{}<>]{4,200}))"
_PASSWORD = re.compile(
    r"\b(?:password|passwd|passphrase|passcode|pwd)(?:[\"']?[ \t]{0,3}(?::|=|=>)[ \t]{0,3}|[ \t]{1,3}is:?[ \t]{1,3})"
    + _VALUE,
    re.I,
)
_ASSIGNED = re.compile(
    r"(?:api|access|auth|client|secret|private|bearer|refresh)[ _-]?(?:key|token|secret)(?:[ _-]?(?:key|id))?"
    r"(?:[\"']?[ \t]{0,3}(?::|=|=>)[ \t]{0,3}|[ \t]{1,3}is:?[ \t]{1,3})" + _VALUE,
    re.I,
)
_BEARER = re.compile(r"\b(?:Bearer|Basic) (?P<bare>[\w.~+/-]{16,2000}={0,2})(?![\w=])")


def keys(text: str) -> Iterator[tuple[int, int]]:
    """Where secrets are; of an assignment the value alone."""
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in _PRIVATE_KEY.finditer(text))
    if "://" in text and "@" in text:
        yield from (match.span() for match in _IN_URL.finditer(text))
    if _LONG_WORD.search(text):
        yield from (match.span() for match in _ISSUED.finditer(text))
        if " " in text:
            yield from (match.span("bare") for match in _BEARER.finditer(text) if _is_random(match["bare"]))
    lowered = text.casefold()
    if "pass" in lowered or "pwd" in lowered:
        yield from _assigned(_PASSWORD, text, shortest=4)
    if "key" in lowered or "token" in lowered or "secret" in lowered:
        yield from _assigned(_ASSIGNED, text, shortest=12)


def _assigned(pattern: re.Pattern[str], text: str, shortest: int) -> Iterator[tuple[int, int]]:
    for match in pattern.finditer(text):
        quoted = match["quoted"] is not None
        start, end = match.span("quoted" if quoted else "bare")
        if not quoted:
            end = start + len(text[start:end].rstrip(".:!?*"))
        value = text[start:end]
        # a call, a path into an object, or a variable is code that reads the secret
        is_code = text[end : end + 1] in ("(", "[", "{") or value.startswith(("$", "os.", "process.", "self."))
        if end - start >= shortest and not is_code and _is_random(value):
            yield start, end


def _is_random(value: str) -> bool:
    """Letters and something else in one word: `hunter2` and not `required`, `8` or `********`."""
    return re.search(r"[^\W\d_]", value) is not None and re.search(r"[\d!@#$%^&*+=]", value) is not None

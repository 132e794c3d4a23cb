"""E-mail and IP addresses. Knows how they are written; asks no network."""

import ipaddress
import re
from collections.abc import Iterator

# Each begins at a boundary and has bounded repeats, so that no text makes it slow.
_EMAIL = re.compile(
    r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24}(?![\w-])(?!:\w)"
)
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-])(?!\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.I)
_VERSION = re.compile(r"\b(?:version|release|v)[ .]?$", re.I)


def emails(text: str) -> Iterator[tuple[int, int]]:
    """Where e-mail addresses are."""
    if "@" in text:
        yield from (match.span() for match in _EMAIL.finditer(text))


def ips(text: str) -> Iterator[tuple[int, int]]:
    """Where IPv4 and IPv6 addresses are."""
    if text.count(".") >= 3:
        for match in _IPV4.finditer(text):
            if _is_address(match[0]) and not _VERSION.search(text[max(0, match.start() - 10) : match.start()]):
                yield match.span()
    if text.count(":") >= 2:
        for match in _IPV6.finditer(text):
            # a group of digits and letters: `a::b` is more often code than an address
            if re.search(r"(?=[a-f]*\d)[0-9a-f]{3,4}", match[0], re.I) and _is_address(match[0]):
                yield match.span()


def _is_address(text: str) -> bool:
    """Whether it is an IP address that can belong to a person's machine."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast)

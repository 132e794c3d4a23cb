"""Fuzzes the reader of safetensors headers, guided by coverage.

Nothing may crash it, and it may accept nothing that the safetensors library refuses.

    pip install atheris safetensors
    PYTHONPATH=. python scripts/fuzz_headers.py -max_total_time=600 -max_len=600 CORPUS

CORPUS is a folder that keeps what reached something new; it begins with a few good headers.
"""

import json
import re
import sys
from pathlib import Path

import atheris
import safetensors

with atheris.instrument_imports(include=["mlxtune.headers", "json"]):
    from mlxtune import headers

counts = {"refused": 0, "accepted": 0}
WORDS = [
    '"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', '"F32"', '"BF16"', '"F4"', '"F6_E2M3"', '"BOOL"',
    "[0,8]", "[8,8]", "[0]", "[]", "{}", "null", "NaN", "-0", "1e0", "2147483648", "18446744073709551616", "\\\\ud800",
    '"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},', '"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
]  # fmt: skip
TENSORS = [
    {},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    {
        "__metadata__": {"format": "mlx"},
        "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]},
        "c": {"dtype": "F4", "shape": [2], "data_offsets": [8, 9]},
    },
]


def one(content: bytes) -> None:
    """Reads a file's content here and in the library. The first bytes say how the lengths are made good."""
    if content[:1] == b"\0" and len(content) > 2:
        header = content[2:]
        ends = [int(each) for each in re.findall(rb"[0-9]{1,3}", header)]
        data = content[1] if content[1] < 255 else max(ends, default=0)
        content = len(header).to_bytes(8, "little") + header + bytes(data)
    try:
        size = headers.header_size(content[:8], len(content))
        found = headers.parse(content[8 : 8 + size], len(content))
    except headers.Malformed:
        counts["refused"] += 1
        return
    counts["accepted"] += 1
    if counts["accepted"] % 1_000 == 0:
        print(f"{counts['refused']:,} refused, {counts['accepted']:,} accepted, as the library does", flush=True)
    theirs = {name: (each["dtype"], each["shape"], each["data"]) for name, each in safetensors.deserialize(content)}
    ours = {name: (each.dtype, list(each.shape), content[each.start : each.end]) for name, each in found.items()}
    if ours != theirs:
        raise AssertionError(f"{ours} is not {theirs}")


if __name__ == "__main__":
    corpus = Path(sys.argv[-1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, tensors in enumerate(TENSORS):
        size = max((each["data_offsets"][1] for name, each in tensors.items() if name != "__metadata__"), default=0)
        for kept in (size, 255):
            (corpus / f"good-{number}-{kept}").write_bytes(bytes([0, kept]) + json.dumps(tensors).encode())
    words = corpus.with_suffix(".dict")
    words.write_text("".join('"' + word.replace('"', '\\"') + '"\n' for word in WORDS))
    atheris.Setup([*sys.argv[:-1], f"-dict={words}", str(corpus)], one)
    atheris.Fuzz()

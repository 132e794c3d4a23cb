"""Brings a model here, with a progress line while the hub sends it."""

from pathlib import Path

from mlxtune.cli import display


def fetch(name: str, revision: str | None) -> Path:
    """The folder of a model: embedded, local, cached, or downloaded now. Raises what `hub.fetch` raises."""
    from mlxtune import hub

    with display.phases() as shown:
        path = hub.fetch(name, revision, lambda done, total: shown("fetch (MB)", done // 10**6, total // 10**6))
    from mlxtune import folder  # needs mlx, which takes its time

    for file in folder.stale(path):
        display.warn(f"{file.name} is not in the model's index and is not read")
    return path

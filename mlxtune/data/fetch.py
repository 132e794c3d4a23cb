"""A data set of the Hugging Face hub, or a folder laid out as one -> rows by split. Knows the library `datasets`."""

import re
from pathlib import Path
from typing import Any

from mlxtune.data.contents import MOST
from mlxtune.data.files import SPLIT_NAMES, Row
from mlxtune.data.parquet import rows_of
from mlxtune.errors import DataError, HubError, InputError

INSTALL = "install it with `pip install 'mlxtune[datasets]'`"
BATCH = 1024  # rows


def fetch(name: str) -> dict[str, list[Row]]:
    """The rows of `org/name`, `org/name/config` or `org/name:split`, by split; those of one split under `all`.

    Raises InputError without the library, HubError if the hub does not give it, DataError for splits of other names.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("needs the library `datasets`", where=name, hint=INSTALL) from None
    path, config, split = parts_of(name)
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(path, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        hint = "check the name, the network and `hf auth login`"
        raise HubError(f"cannot be fetched: {_first_line(error)}", where=name, hint=hint) from None
    except (ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        hint = "name one as in org/name/config or org/name:split"
        raise DataError(f"cannot be read: {_first_line(error)}", where=name, hint=hint) from None
    finally:
        if shown:
            datasets.enable_progress_bars()
    splits = {"all": found} if split is not None else dict(found)
    if len(splits) == 1:
        return {"all": _rows(name, next(iter(splits.values())))}
    return {key: _rows(f"{name}:{given}", splits[given]) for key, given in _our_names(name, list(splits)).items()}


def parts_of(name: str) -> tuple[str, str | None, str | None]:
    """Path, configuration and split that a name gives; a folder that exists is a path."""
    if Path(name).exists():
        return name, None, None
    found = re.fullmatch(r"([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?", name)
    if found is None:
        raise DataError("is no name of a data set", where=name, hint="write org/name or org/name:split")
    return found[1], found[2], found[3]


def _our_names(name: str, given: list[str]) -> dict[str, str]:
    """Our name of each split: `train`, `valid`, `test`. Raises DataError where a split has none."""
    ours = {other: split for split, others in SPLIT_NAMES.items() for other in others}
    if not set(given) <= ours.keys() or len({ours[each] for each in given}) < len(given):
        hint = f"name one, as in {name}:{given[0]}"
        raise DataError(f"has the splits {', '.join(given)}", where=name, hint=hint)
    return {ours[each]: each for each in given}


def _rows(name: str, split: Any) -> list[Row]:
    tables = split.with_format("arrow").iter(batch_size=BATCH)
    batches = (batch for table in tables for batch in table.to_batches())
    rows = []
    for found in rows_of(name, batches, MOST):
        if isinstance(found, DataError):
            raise found
        rows.append(Row(name, *found))
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""The one door to mlx-lm: all that mlxtune borrows from it, imported so that the process stays as it was."""

import contextlib
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from typing import Any

# transformers speaks of frameworks that mlxtune does not need
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextlib.contextmanager
def _open_file_limit_kept() -> Iterator[None]:
    """Importing `mlx_lm.utils` lowers the process's limit of open files for good; here it cannot."""
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


with _open_file_limit_kept():
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.models.cache import (
        can_trim_prompt_cache,
        create_attention_mask,
        make_prompt_cache,
        trim_prompt_cache,
    )
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
    from mlx_lm.quant import awq
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import (
        MODEL_REMAPPING,
        get_total_parameters,
        load_model,
        load_tokenizer,
    )

AWQ_MODEL_CONFIGS: dict[str, Any] = awq.AWQ_MODEL_CONFIGS
_SILENT = threading.Lock()


class _Silent:
    """Stands for tqdm: gives what it goes over, and writes nothing."""

    def __new__(cls, blocks: Iterable[Any]) -> Any:
        return blocks

    @staticmethod
    def write(text: str) -> None:
        """Keeps `text` to itself."""


def awq_quantize(*args: Any, **options: Any) -> None:
    """mlx-lm's `awq_quantize`, without the bar and the lines that it writes to stderr and stdout."""
    with _SILENT:
        tqdm, awq.tqdm = awq.tqdm, _Silent
        try:
            awq.awq_quantize(*args, **options)
        finally:
            awq.tqdm = tqdm


__all__ = [
    "AWQ_MODEL_CONFIGS",
    "MODEL_REMAPPING",
    "BatchGenerator",
    "DoRALinear",
    "LoRALinear",
    "LoRASwitchLinear",
    "MultiLinear",
    "QuantizedMultiLinear",
    "QuantizedSwitchLinear",
    "SwitchLinear",
    "TokenizerWrapper",
    "awq_quantize",
    "can_trim_prompt_cache",
    "create_attention_mask",
    "generate_step",
    "get_total_parameters",
    "linear_to_lora_layers",
    "load_model",
    "load_tokenizer",
    "make_prompt_cache",
    "trim_prompt_cache",
]

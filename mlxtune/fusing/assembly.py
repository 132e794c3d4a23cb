"""Puts a fused model together: makes the adapted layers again, each into a file of its own, and writes the whole.

Of the base no more is read at once than a layer. Only seeing what goes into the layers takes all of it. Knows folders
and samples, not what is measured.
"""

import copy
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxtune import adapter, model, precision, shards, sources
from mlxtune.data.render import Sample
from mlxtune.errors import ModelError, RecipeError
from mlxtune.fusing import blend, requantize
from mlxtune.fusing.blend import Part
from mlxtune.fusing.requantize import Change
from mlxtune.model import LanguageModel
from mlxtune.precision import bits_per_weight
from mlxtune.quant import calibrate
from mlxtune.quant.calibrate import Inputs
from mlxtune.recipe import FuseRecipe
from mlxtune.shards import Piece
from mlxtune.tokenizer import load_tokenizer

CALIBRATION_TOKENS = 32_768  # read, evenly from the training rows, to see what goes into the layers
FINE_BITS = 8  # with which a layer loses nothing to speak of, fitted or not
HALF_A_BIT = 0.5

OnPhase = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, slots=True)
class Job:
    """What is fused into what, and what it is fitted to and measured on."""

    base: Path
    parts: tuple[Part, ...]
    settings: FuseRecipe
    original: Path | None
    samples: Sequence[Sample]
    training: Sequence[Sample]
    on_phase: OnPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Another way to fuse, and what the model would take."""

    flag: str
    bytes: int
    bits_per_weight: float


class Work:
    """A fused model as it comes into being: the layers that are made again, each in a file, and how they are packed."""

    def __init__(self, job: Job, scratch: Path):
        self.job, self.scratch, self.files = job, scratch, scratch / "layers"
        net, _ = self._adapted()
        plain, _ = model.outline(job.base)
        self.asked = requantize.planned(net, plain, job.settings)
        if job.settings.max_bpw is not None and not any(self.asked.values()):
            raise RecipeError("has no effect where no layer is packed", where="fuse.max_bpw", hint="leave it out")
        self.layers = len(adapter.adapted_layers(net)) or len(adapter.tensor_names(job.parts[0].path))
        self.packings = dict(self.asked)
        self.waiting = dict(self.packings)  # what is not made yet
        self.shells: dict[str, nn.Module] = {}
        self.changes: dict[str, Change] = {}
        self.calibrated = 0
        self.limit: float | None = None

    def _adapted(self) -> tuple[nn.Module, LanguageModel]:
        """The base with its adapters, of which nothing but these is read."""
        net, config = model.outline(self.job.base)
        lm = LanguageModel(net, load_tokenizer(self.job.base, config), config, self.job.base)
        blend.attach(lm, self.job.parts)
        return lm.net, lm

    def write(self) -> set[int]:
        """Makes the layers that wait and writes the model; returns the tokens that end an answer."""
        self._make()
        for file in self.scratch.glob("model*.safetensors*"):
            file.unlink()
        net, lm = self._adapted()
        net.update_modules(tree_unflatten([(name, self._made(name)) for name in self.packings]))
        if self.job.settings.dequantize:
            _take_original(net, self.job, self.packings)
            precision.dequantize(net)
        plain, _ = model.outline(self.job.base)
        config = requantize.described(lm.config, plain, self.packings, self.job.settings.bits)
        if self.job.settings.dequantize:
            config = {key: each for key, each in config.items() if key not in ("quantization", "quantization_config")}
        self.bits_per_weight = bits_per_weight(net)
        self.limit = self.limit or self.job.settings.max_bpw or self.bits_per_weight + HALF_A_BIT
        self.config, ends = config, set(lm.tokenizer.eos_token_ids)
        pieces = shards.of_network(net)
        del net, lm, plain
        waiting = (_finite(pieces.pop(0), self.job.base) for _ in range(len(pieces)))
        shards.write(self.scratch, waiting, lambda done, total: self.job.on_phase("written", done, total))
        shards.describe(self.scratch, config, self.job.base)
        return ends

    def _make(self) -> None:
        """Makes the layers that wait, each into its file, with what goes into them where there are training rows."""
        self.files.mkdir(exist_ok=True)
        net, _ = self._adapted()
        originals = _originals(self.job)
        with closing(self._calibrated(net)) as calibrated:
            for names, inputs in calibrated:
                some = {name: self.waiting.pop(name) for name in names}
                chosen = {name: originals.pop(name) for name in names if name in originals}
                for change in requantize.remake(net, some, inputs, chosen, self._keep):
                    self.changes[change.name] = change
                inputs.clear()  # before the next are found
                self.job.on_phase("layers fused", len(self.packings) - len(self.waiting), len(self.packings))

    def _calibrated(self, net: nn.Module) -> Generator[tuple[list[str], dict[str, Inputs]], None, None]:
        """The layers that wait, some at a time, with what goes into them; those of many bits or dense get nothing."""
        packed = [name for name, each in self.waiting.items() if each is not None and each.bits < FINE_BITS]
        alone = [name for name in self.waiting if name not in packed or not self.job.training]
        yield from (([name], {}) for name in alone)
        if not packed or not self.job.training:
            return
        rows, config = calibration_rows(self.job.training), model.check(self.job.base)
        self.calibrated = len(rows)
        adapted = {name for name, _ in adapter.adapted_layers(net)}
        inside = {f"{name}.linear" if name in adapted else name: name for name in packed}
        lm = LanguageModel(net, load_tokenizer(self.job.base, config), config, self.job.base)

        def make() -> nn.Module:
            tuned = replace(lm, net=model.unread(self.job.base, config))
            blend.attach(tuned, self.job.parts)
            return tuned.net

        for found in calibrate.gathered(make, rows, list(inside), hessian=True):
            names, inputs = [inside[name] for name in found], {inside[name]: each for name, each in found.items()}
            found.clear()  # what is held here would be held while the next are found
            yield names, {name: each for name in names if (each := inputs.pop(name)) is not None}

    def _keep(self, name: str, made: nn.Module) -> nn.Module:
        """Writes a layer to its file; what is returned, and what `_made` returns later, holds no values until used."""
        tensors = {part: each for part, each in made.items() if isinstance(each, mx.array)}
        mx.save_safetensors(str(self._file(name)), tensors)
        made.update({part: mx.zeros(()) for part in tensors})
        mx.clear_cache()  # or what was let go would stay in memory
        self.shells[name] = made
        return self._made(name)

    def _made(self, name: str) -> nn.Module:
        layer = copy.copy(self.shells[name])
        tensors = mx.load(str(self._file(name)))
        assert isinstance(tensors, dict)
        layer.update(tensors)
        return layer

    def _file(self, name: str) -> Path:
        return self.files / f"{list(self.packings).index(name)}.safetensors"

    def raise_bits(self, kept: float | None) -> bool:
        """Lets the worst layers be made again with more bits, where too little was kept and there is room for more."""
        settings = self.job.settings
        fixed = settings.bits is not None and settings.max_bpw is None  # so many bits are asked for, no more
        if kept is None or max(kept, 0.0) >= settings.aim or fixed or self.limit is None:
            return False
        plain, _ = model.outline(self.job.base)
        spare = (self.limit - self.bits_per_weight) * precision.parameter_count(plain)
        self.waiting = dict(requantize.raised(self.packings, list(self.changes.values()), plain, spare))
        self.packings |= self.waiting
        return bool(self.waiting)

    @property
    def raised(self) -> dict[str, int]:
        """The layers that have more bits than were asked for."""
        pairs = [(name, each, self.asked[name]) for name, each in self.packings.items()]
        return {name: each.bits for name, each, asked in pairs if each is not None and each != asked}

    def clean(self) -> None:
        """Removes the layers' own files."""
        shutil.rmtree(self.files)


def _finite(piece: Piece, where: Path) -> Piece:
    """`piece`, which raises ModelError when it makes NaN or infinite values."""

    def made(job: shards.Job) -> list[mx.array]:
        arrays = [mx.contiguous(each) for each in job()]
        for tensor, each in zip(piece.tensors, arrays, strict=True):
            if not sources.is_finite(each):
                what = f"holds NaN or infinite values in {tensor.name}"
                raise ModelError(what, where=where, hint="download or train the model again")
        return arrays

    return replace(piece, jobs=lambda: (partial(made, job) for job in piece.jobs()))


def _originals(job: Job) -> dict[str, nn.Module]:
    """The layers of the original model by name, of which nothing is read."""
    if job.original is None:
        return {}
    net, _ = model.outline(job.original)
    return {name: each for name, each in net.named_modules() if isinstance(each.get("weight"), mx.array)}


def _take_original(net: nn.Module, job: Job, made: Mapping[str, Any]) -> None:
    """Puts the original layers in the place of those that were quantized from them and that no adapter changes."""
    layers = _originals(job)
    quantized = [name for name, each in net.named_modules() if isinstance(each, precision.QUANTIZED)]
    net.update_modules(
        tree_unflatten([(name, layers[name]) for name in quantized if name in layers and name not in made])
    )


def calibration_rows(training: Sequence[Sample]) -> list[Sample]:
    """Rows, evenly from `training`, of about CALIBRATION_TOKENS tokens."""
    tokens = sum(len(sample.tokens) for sample in training)
    return list(training[:: max(1, -(-tokens // CALIBRATION_TOKENS))])


def ways_out(base: Path, adapters: Sequence[Part], settings: FuseRecipe) -> list[Way]:
    """Ways to fuse that keep more, from the fewest bits to the most, with what the model would take."""
    net, config = model.outline(base)
    lm = LanguageModel(net, load_tokenizer(base, config), config, base)
    blend.attach(lm, adapters)
    plain, _ = model.outline(base)
    packings = requantize.planned(lm.net, plain, replace(settings, bits=None, dequantize=False))
    weights = precision.parameter_count(plain)
    stored = bits_per_weight(plain) * weights
    found = []
    if any(packings.values()) and not settings.original and settings.bits is None:
        found.append(Way(flag="--base ORIGINAL", bytes=int(stored / 8), bits_per_weight=stored / weights))
    for bits in requantize.WIDTHS:
        wider = {name: each for name, each in packings.items() if each is not None and each.bits < bits}
        if wider and bits > (settings.bits or 0):
            more = sum(requantize.extra_bits(plain, name, each, bits) for name, each in wider.items())
            found.append(
                Way(flag=f"--q-bits {bits}", bytes=int((stored + more) / 8), bits_per_weight=(stored + more) / weights)
            )
    if any(packings.values()):
        precision.dequantize(plain)
        dense = bits_per_weight(plain)
        found.append(Way(flag="--dequantize", bytes=int(dense * weights / 8), bits_per_weight=dense))
    return found

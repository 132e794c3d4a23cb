"""Fuses adapters into their base and measures what was kept. Knows folders and samples, not files of data.

The fused model is written a tensor at a time, as are the layers that are made again, each into a file of its own first.
Only measuring, and finding what goes into the layers, takes a whole model: base, adapter and fused one after the other.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from mlxtune import likelihood, machine, model, precision
from mlxtune.data.render import Sample
from mlxtune.errors import FuseError, InputError, ModelError, RecipeError
from mlxtune.export import card
from mlxtune.fusing import blend, survival
from mlxtune.fusing.assembly import Job, OnPhase, Work
from mlxtune.fusing.blend import Part
from mlxtune.fusing.requantize import Change
from mlxtune.fusing.survival import Survival, kept_share
from mlxtune.recipe import FuseRecipe, check_quantization
from mlxtune.rundir import RunDir, refuse_existing, size_of, staged, write_json
from mlxtune.tokenizer import check_vocabulary, load_tokenizer, write_template


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """What fusing did to `layers` layers, or tensors of a full tuning; `kept` is the share of the adapter's gain.

    Losses in nats per supervised token on `rows` rows, `kl` the mean KL(adapter ‖ fused) of their supervised tokens,
    `same_top` the share of these with the same most likely token. They and `kept` are None where there were no rows;
    `kept` is None too where the adapter gained nothing. `raised` are layers that got more bits than asked,
    `calibrated` the rows that packed layers were fitted to, `changes` what became of each layer's change.
    """

    path: str
    adapters: dict[str, float]
    layers: int
    bits: int | None
    bits_per_weight: float
    bytes: int
    rows: int
    base_loss: float | None
    adapter_loss: float | None
    fused_loss: float | None
    kept: float | None
    kl: float | None
    same_top: float | None
    calibrated: int
    raised: dict[str, int]
    changes: tuple[Change, ...]


def fuse(
    base: Path,
    adapters: Path | Sequence[Part],
    out: Path,
    settings: FuseRecipe,
    samples: Sequence[Sample] = (),
    training: Sequence[Sample] = (),
    original: Path | None = None,
    on_phase: OnPhase = lambda phase, done, total: None,
) -> Fused:
    """Writes base + adapter as one model to `out`, in the base's own precision unless `settings` says otherwise.

    `training` rows, if there are any, fit layers that are packed again to what goes into them. `original` is the model
    that the base was quantized from: then the change is added to its weights. Several adapters are added, each with
    its weight. Where less than `settings.aim` of the gain on `samples` survives, the worst layers get more bits.

    Raises FuseError, and writes nothing, when less than `settings.keep` survives, unless the loss is accepted.
    """
    refuse_existing(out, "--save-path")
    if settings.bits is not None:
        check_quantization(settings.bits, 64, "affine", "fuse")
    if settings.original and original is None:
        what = "needs a base that was quantized, and the model that it was made of"
        raise RecipeError(what, where="fuse.original", hint="leave it out")
    given = [Part(adapters)] if isinstance(adapters, Path) else adapters
    parts = tuple(replace(part, weight=part.weight * settings.scale) for part in given)
    for inside in (base, *(part.path for part in parts), *([original] if original is not None else [])):
        if inside.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError("lies inside its own input", where=out, hint="choose a folder outside it")
    job = Job(base, parts, settings, original, samples, training, on_phase)
    template = blend.check(parts).get("chat_template")
    machine.configure()
    _check(job)
    with staged(out) as scratch, ExitStack() as stack:
        memory = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        work = Work(job, scratch)
        losses = _losses_before(job, memory)
        fused_loss, survived = _written(job, work, template, memory)
        while work.raise_bits(kept_share(*losses, fused_loss)):
            fused_loss, survived = _written(job, work, template, memory)
        result = _result(job, work, out, losses, fused_loss, survived)
        _refuse_loss(result, settings, out)
        work.clean()
        write_json(scratch / "fuse.json", _told_along(result, out))
        run = RunDir(parts[0].path.resolve().parent)
        card.write_fused(scratch, run if run.recipe.is_file() else None)
    return result


def _told_along(result: Fused, out: Path) -> dict[str, Any]:
    """What goes into the folder, which may be handed on: its own place is left out, adapters are named from there."""
    value = asdict(result)
    value.pop("path")
    here = out.resolve()
    return {
        **value,
        "adapters": {os.path.relpath(Path(each).resolve(), here): weight for each, weight in result.adapters.items()},
    }


def _result(
    job: Job,
    work: Work,
    out: Path,
    losses: tuple[float | None, float | None],
    fused: float | None,
    survived: Survival | None,
) -> Fused:
    packing = work.config.get("quantization")
    return Fused(
        path=str(out),
        adapters={str(part.path): part.weight for part in job.parts},
        layers=work.layers,
        bits=(job.settings.bits or int(packing["bits"])) if packing else None,
        bits_per_weight=work.bits_per_weight,
        bytes=sum(size_of(file) for file in model.weight_files(work.scratch)),
        rows=len(job.samples),
        base_loss=losses[0],
        adapter_loss=losses[1],
        fused_loss=fused,
        kept=kept_share(*losses, fused),
        kl=survived.kl if survived else None,
        same_top=survived.same_top if survived else None,
        calibrated=work.calibrated,
        raised=work.raised,
        changes=tuple(work.changes[name] for name in work.packings if name in work.changes),
    )


def _check(job: Job) -> None:
    """Refuses what the headers alone show: an unusable base, or an original that cannot be one."""
    config = model.check(job.base)
    check_vocabulary(load_tokenizer(job.base, config), config.get("vocab_size"), job.base)
    if job.original is None:
        return
    if "quantization" not in config:
        raise InputError("is of use for a quantized base only", where="--base", hint="leave it out")
    if "quantization" in model.check(job.original):
        raise ModelError("is quantized itself", where=job.original, hint="give the model that the base was made of")


def _losses_before(job: Job, memory: IO[bytes]) -> tuple[float | None, float | None]:
    """Losses of base and adapter; what the adapter predicts goes into `memory`."""
    if not job.samples:
        return None, None
    lm = model.load(job.base, thrifty=True)
    job.on_phase("measured", 0, 3)
    with precision.one_by_one(lm.net):
        base_loss = likelihood.mean_nats(lm.net, job.samples)
    blend.attach(lm, job.parts)
    job.on_phase("measured", 1, 3)
    with precision.one_by_one(lm.net):
        adapter_loss = likelihood.mean_nats(lm.net, job.samples)
        survival.remember(lm.net, survival.compared_rows(job.samples, survival.vocabulary_of(lm.net)), memory)
    job.on_phase("measured", 2, 3)
    return base_loss, adapter_loss


def _written(job: Job, work: Work, template: str | None, memory: IO[bytes]) -> tuple[float | None, Survival | None]:
    """Writes the model; its loss, and how far it is from what the adapter predicted."""
    ends = work.write()
    if template is not None:
        write_template(work.scratch, template, ends)
    if not job.samples:
        return None, None
    net = model.load(work.scratch, thrifty=True).net
    rows = survival.compared_rows(job.samples, survival.vocabulary_of(net))
    with precision.one_by_one(net):
        survived = survival.compare(net, rows, memory)
        return likelihood.mean_nats(net, job.samples), survived


def _refuse_loss(result: Fused, settings: FuseRecipe, out: Path) -> None:
    if result.kept is None or max(result.kept, 0.0) >= settings.keep or settings.accept_loss:
        return
    raise FuseError(
        f"fusing would keep {max(0.0, result.kept):.0%} of what the adapter learned, less than {settings.keep:.0%} "
        f"(loss of base {result.base_loss:.4f}, adapter {result.adapter_loss:.4f}, fused {result.fused_loss:.4f}); "
        "nothing was written",
        where=out,
        hint=f"use {' or '.join(flags_out(result.bits))}",
    )


def flags_out(bits: int | None) -> list[str]:
    """What would keep more of the adapter, or write the model all the same."""
    wider = [] if bits is None or bits >= 8 else ["--q-bits 8"]
    return [*wider, *([] if bits is None else ["--dequantize"]), "--accept-loss"]

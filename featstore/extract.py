"""Extraction: run a frozen backbone once over data sets and keep its activations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.assign import Framing
from featstore.errors import ConflictError, InvalidInputError
from featstore.extraction import Extraction, ExtractReport
from featstore.feature_sets import FinalNorm, NewFeatureSet
from featstore.files import exclusive
from featstore.hashing import short_key
from featstore.index import refresh
from featstore.latency import latency_path, record_latency
from featstore.layout import choose_shard_rows
from featstore.plan import ExtractPlan, RunOptions
from featstore.planning import open_readers, select_items
from featstore.shared_shards import Crew
from featstore.source_specs import BackboneSpec, ImportSpec, SourceSpec, check_named, specs_of
from featstore.sources import BackboneSource, ImportSource, Readers, weights_argument
from featstore.store import STORE_DTYPES, check_target, locate
from featstore.types import (
    FeatureReader,
    Progress,
    ProgressCallback,
    Reader,
    TapShape,
    ignore_progress,
)
from featstore.version import __version__
from featstore.views import check_importable

if TYPE_CHECKING:
    from featstore.backbones import Backbone
    from featstore.dask_runner import Cluster


def extract(
    store: str | Path,
    *,
    backbone: str | None = None,
    data: Sequence[str | Reader],
    taps: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    resize: str = "squash",
    dtype: str = "float16",
    weights: str | Path | None = None,
    tail: int | str | None = None,
    options: RunOptions | None = None,
    progress: ProgressCallback = ignore_progress,
) -> ExtractReport:
    """Run a frozen backbone over data sets and keep its activations in `store`.

    What is stored already is reused: an interrupted extraction goes on, and taps, data sets and
    views are added to what is there. Data sets of format ``features`` are imported; they need no
    backbone.

    Args:
        store: Folder or URL of the store, made if it does not exist.
        backbone: Name from `featstore backbones`, a timm name with its tag, ``hf-hub:...`` or
            ``local-dir:...``.
        data: Data sets as ``[NAME=]FORMAT:PATH``, or open readers.
        taps: Taps; None stores four blocks and the final norm, or all stages.
        image_size: Height and width of the backbone's input in pixels; None: about 224.
        resize: "squash", "letterbox", "crop", "pad" or with a basis, such as
            "crop+via:224:nearest" (see FORMAT.md).
        dtype: "float16", "float32" or "bfloat16".
        weights: A weights file, or "random[:SEED]"; None: the published ones.
        tail: Last blocks whose weights are stored, with the final norm; "auto": the most, up to
            4, that one of the taps feeds.
        options: What decides speed and coverage, not numbers; with `workers` or `scheduler`, a
            Dask cluster runs the backbone.
        progress: Called with reports of progress.

    Returns:
        What was done; `bad` lists the images that were left out, with reasons, and `set_aside`
        the shards of which workers died.

    Raises:
        InvalidInputError: An argument or a data set is not acceptable; nothing was written.
        ConflictError: The feature set was removed meanwhile, or another process holds a lock for
            hours.
        StorageError: The disk refused; everything committed is safe.
    """
    options = options or RunOptions()
    began = time.perf_counter()
    path = locate(store)
    check_target(path)
    if is_spread(options):
        check_named(data)
    readers = open_readers(data)
    selected = select_items(readers, options)
    extraction = Extraction(
        path, readers, selected, options=options, progress=progress, began=began
    )
    is_import = any(isinstance(reader, FeatureReader) for reader in readers)
    if is_import:
        _check_import(readers, options, tail)
    elif backbone is None:
        raise InvalidInputError("No backbone was given. Name one of `featstore backbones`.")
    with _cluster_of(options, progress) as cluster:
        if is_import or backbone is None:
            report = _import(extraction, readers[0], dtype, cluster)
        else:
            if cluster is not None:
                cluster.warm_up()
            model = prepare_backbone(
                backbone,
                image_size=image_size,
                resize=resize,
                weights=weights,
                # The workers of a cluster have one each on their devices.
                device=options.device if cluster is None else "cpu",
                taps=taps,
                tail=tail,
            )
            plan = plan_of(model, resize=resize, dtype=dtype)
            report = _run(extraction, model, plan, weights, cluster)
    # The index can be made at any time; somebody else makes it now, or the next question does.
    with contextlib.suppress(ConflictError):
        refresh(path)
    return report


def is_spread(options: RunOptions) -> bool:
    """Tell whether other processes than this one are to run the backbone."""
    return options.workers is not None or options.scheduler is not None


@contextlib.contextmanager
def _cluster_of(options: RunOptions, progress: ProgressCallback) -> Iterator[Cluster | None]:
    if not is_spread(options):
        yield None
        return
    from featstore.dask_runner import Cluster

    def tell(message: str) -> None:
        progress(Progress(stage="extract", message=message))

    with Cluster(options, tell=tell) as cluster:
        yield cluster


def _check_import(readers: Sequence[Reader], options: RunOptions, tail: int | str | None) -> None:
    check_importable(options.views)
    if tail not in (None, "auto"):
        raise InvalidInputError(
            "Imported features come without a backbone, so they have no tail. Leave out --tail."
        )
    if len(readers) != 1:
        raise InvalidInputError(
            "Features are imported one data set at a time, and not together with images. "
            "Give a single --data features:PATH."
        )


def prepare_backbone(
    name: str,
    *,
    image_size: tuple[int, int] | None,
    resize: str,
    weights: str | Path | None,
    device: str,
    taps: Sequence[str] | None,
    tail: int | str | None = None,
) -> Backbone:
    """Load a backbone for an input size; `pad` rounds the size up to the patch."""
    from featstore.backbones import load_backbone, padded_size

    if resize == "pad" and image_size is not None:
        image_size = padded_size(name, image_size)
    return load_backbone(
        name, image_size=image_size, weights=weights, device=device, taps=taps, tail=tail
    )


def plan_of(model: Backbone, *, resize: str, dtype: str) -> ExtractPlan:
    """Write down what decides the numbers that `model` gives."""
    return ExtractPlan(
        architecture=model.architecture,
        tag=model.tag,
        weights_sha256=model.weights_sha256,
        image_size=model.input_hw,
        resize=resize,
        interpolation=model.interpolation,
        mean=model.mean,
        std=model.std,
        position_grid=model.position_grid,
        dtype=dtype,
    )


def _run(
    extraction: Extraction,
    model: Backbone,
    plan: ExtractPlan,
    weights: str | Path | None,
    cluster: Cluster | None,
) -> ExtractReport:
    device = model.device if cluster is None else cluster.device
    batch_size = extraction.options.batch_size or default_batch_size(device)
    for text in _tail_messages(model):
        extraction.progress(Progress(stage="extract", message=text))
    store = extraction.open_store()
    spec = BackboneSpec(
        identity=model.identity(),
        plan=plan,
        weights=weights_argument(weights),
        taps=model.taps,
        device=device,
        data=specs_of(extraction.readers),
    )
    report = extraction.run(
        store,
        _new_feature_set(model, plan, weights, device=device, batch_size=batch_size),
        [model.tap_shapes[tap] for tap in model.taps],
        framing=Framing(input_hw=plan.image_size, resize=plan.resize),
        source=BackboneSource(Readers(store, extraction.readers), model, plan),
        batch_size=batch_size,
        crew=_crew_of(cluster, spec),
    )
    if not extraction.options.latency or cluster or extraction.options.shard_range:
        return report  # beside others that compute, no time would mean anything
    lock = store.locks_path / f"latency-{plan.key()}.lock"
    with exclusive(lock, purpose="timing the backbone", timeout_s=_LATENCY_WAIT_S):
        path = latency_path(store.path, plan.key())
        latency = record_latency(path, model, is_renewed=report.new_rows > 0)
    return replace(report, latency=latency)


def _new_feature_set(
    model: Backbone,
    plan: ExtractPlan,
    weights: str | Path | None,
    *,
    device: str,
    batch_size: int,
) -> NewFeatureSet:
    norm = model.final_norm
    return NewFeatureSet(
        key=plan.key(),
        name=feature_set_name(model.name, plan),
        dtype=plan.dtype,
        shard_rows=choose_shard_rows(
            bytes_per_row=widest([model.tap_shapes[tap] for tap in model.taps], plan.dtype),
            flops_per_row=model.flops_per_image,
            device=device,
        ),
        plan=plan,
        backbone=model.identity(),
        provenance={
            "featstore": __version__,
            "libraries": dict(model.library_versions),
            "weights": weights_argument(weights),
            "batch_size": batch_size,
        },
        final_norm=None
        if norm is None
        else FinalNorm(kind=norm.kind, eps=norm.eps, weight=norm.weight, bias=norm.bias),
        tail=model.tail,
    )


def _tail_messages(model: Backbone) -> list[str]:
    """Say why "auto" stored no tail, or that no tap of this run feeds the one that is stored."""
    if model.tail_note:
        return [f"No tail is stored: {model.tail_note}"]
    if model.tail is None:
        return []
    last = model.tail.spec.n_blocks
    inputs = [model.tail.spec.last(n).input_tap for n in range(last, 0, -1)]
    if set(inputs) & set(model.taps):
        return []
    return [f"None of the taps of this run feeds the tail, which takes {inputs[0]}."]


_IMPORT_BATCH = 64
_LATENCY_WAIT_S = 600.0


def _crew_of(cluster: Cluster | None, spec: SourceSpec) -> Crew | None:
    if cluster is None:
        return None
    from featstore.dask_runner import DaskCrew

    return DaskCrew(cluster, spec)


def _import(
    extraction: Extraction, reader: Reader, dtype: str, cluster: Cluster | None
) -> ExtractReport:
    """Take features over as they are: no plan, and no prediction on new images later."""
    assert isinstance(reader, FeatureReader)
    shapes = list(reader.taps())
    described = [[s.tap, s.dim, list(s.grid or ()), s.n_prefix] for s in shapes]
    key = short_key(["imported", reader.name, dtype, described])
    new = NewFeatureSet(
        key=key,
        name=f"{reader.name}+imported",
        dtype=dtype,
        shard_rows=choose_shard_rows(
            bytes_per_row=widest(shapes, dtype), flops_per_row=1.0, device="cpu"
        ),
        plan=None,
        backbone={"name": "imported"},
        provenance={"featstore": __version__, "source": reader.spec},
        final_norm=None,
    )
    grids = [shape.grid for shape in shapes if shape.grid is not None]
    framing = Framing(input_hw=max(grids, default=(1, 1)), resize="squash")
    store = extraction.open_store()
    return extraction.run(
        store,
        new,
        shapes,
        framing=framing,
        source=ImportSource(Readers(store, [reader]), dtype),
        batch_size=_IMPORT_BATCH,
        crew=_crew_of(cluster, ImportSpec(dtype=dtype, data=specs_of([reader]))),
    )


def widest(shapes: Sequence[TapShape], dtype: str) -> int:
    """Count the bytes of one row of the largest tap."""
    itemsize = int(STORE_DTYPES[dtype][-1])
    return max(shape.bytes_per_row(itemsize) for shape in shapes)


def default_batch_size(device: str) -> int:
    """Give the images of a forward pass that suit a kind of device."""
    return {"cpu": 16, "mps": 32, "cuda": 64}[device.partition(":")[0]]


def feature_set_name(backbone: str, plan: ExtractPlan) -> str:
    """Name a feature set for people: "dinov2_b@224", with what is not the default after it."""
    height, width = plan.image_size
    parts = [f"{backbone}@{height}" if height == width else f"{backbone}@{height}x{width}"]
    if plan.tag.startswith("random"):
        parts.append("random")
    elif plan.tag == "file":
        parts.append("file")
    if plan.resize != "squash":
        parts.append(plan.resize.replace("via:", "via").replace(":", "-"))
    if plan.dtype != "float16":
        parts.append(plan.dtype)
    return "+".join(parts)

"""Training by a preset: what the user left open is filled in, what differs is told and recorded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from featstore.catalogue import CATALOGUE
from featstore.datasets import format_of
from featstore.items import read_dataset
from featstore.plan import ExtractPlan
from heads.build import HEADS
from heads.loop import LoopOptions
from heads.options import split_options
from heads.presets import find_preset
from heads.presets.base import Needs, Preset
from heads.tasks import TASKS

if TYPE_CHECKING:
    from featstore.api import Store
    from heads.setup import Request, Setup

_SETTINGS = ("head", "task", "split", "val_fraction", "steps", "batch_size", "lr", "weight_decay")
_CLOSE = 0.05  # share by which the number of training images may be off without a word


def data_formats(store: Store, data: str | None) -> set[str]:
    """Give the formats of a store's data sets, without their versions.

    Args:
        store: The store.
        data: ``[NAME=]FORMAT:PATH`` where labels are taken from, instead of the store.
    """
    if data is not None:
        return {format_of(data)}
    datasets = store.datasets()
    return {read_dataset(store.folder, name)["format"].partition(".")[0] for name in datasets}


def fill(preset: Preset, given: Mapping[str, Any], formats: Collection[str]) -> dict[str, Any]:
    """Take what the user said, and from the preset what was left open.

    Options of the preset's head or task are left out where another head or task was named.

    Args:
        preset: The preset.
        given: What the user said: fields of a `Request` by name.
        formats: Formats of the data that is learned from, see `data_formats`.

    Returns:
        Fields of a `Request` by name.

    Raises:
        NotFoundError: A head, a task or an option is not known.
        InvalidInputError: An option has a wrong value.
    """
    ours: dict[str, Any] = {name: getattr(preset, name) for name in _SETTINGS}
    if "epochs" in given:
        del ours["steps"]
    filled = {**ours, **given, "preset": preset.name}
    options = _options(preset, filled["head"], filled["task"], formats)
    filled["options"] = options | _typed(given.get("options", {}), filled["head"], filled["task"])
    return filled


def deviations(
    preset: Preset, request: Request, formats: Collection[str]
) -> dict[str, dict[str, Any]]:
    """List where a request is not what the preset says: name to "preset" and "given"."""
    expected: dict[str, Any] = {name: getattr(preset, name) for name in _SETTINGS}
    found: dict[str, Any] = {name: getattr(request, name) for name in _SETTINGS}
    for name, registry in (("head", HEADS), ("task", TASKS)):
        if registry.full_name(found[name]) == registry.full_name(expected[name]):
            found[name] = expected[name]
    if request.epochs is not None:
        found["steps"] = f"{request.epochs} epochs"
    expected |= _options(preset, request.head, request.task, formats)
    found |= _typed(request.options, request.head, request.task)
    return {
        name: {"preset": expected.get(name), "given": value}
        for name, value in found.items()
        if name not in expected or expected[name] != value
    }


def with_preset(setup: Setup, request: Request) -> Setup:
    """Record which preset a training repeats, where it does not, and tell that."""
    if request.preset is None:
        return replace(setup, record={**setup.record, "preset": None})
    preset = find_preset(request.preset)
    differing = deviations(preset, request, data_formats(setup.store, request.data))
    misfitting = misfits(preset, setup, request)
    about = {
        "name": preset.name,
        "variant": preset.variant,
        "paper": preset.paper,
        "deviations": differing,
        "misfits": misfitting,
    }
    told = [f"{preset.name}: {text}" for text in misfitting]
    if differing:
        parts = [f"{n} {d['given']} (preset: {d['preset']})" for n, d in differing.items()]
        told.insert(0, f"{preset.name}, but with {', '.join(parts)}.")
    return replace(
        setup,
        record={**setup.record, "preset": about},
        messages=(*setup.messages, *told),
    )


def _options(preset: Preset, head: str, task: str, formats: Collection[str]) -> dict[str, Any]:
    options = dict(preset.loop_options)
    if HEADS.full_name(head) == HEADS.full_name(preset.head):
        options |= preset.head_options
    if TASKS.full_name(task) == TASKS.full_name(preset.task):
        options |= preset.task_options
        if formats and set(formats) <= set(preset.data):
            options |= preset.data_options
    return options


def _typed(options: Mapping[str, Any], head: str, task: str) -> dict[str, Any]:
    """Read options that came as text, so that "56" is no deviation from 56."""
    owners = {"head": HEADS[head].OPTIONS, "task": TASKS[task].OPTIONS, "loop": LoopOptions}
    found: dict[str, Any] = {}
    for chosen in split_options(options, owners).values():
        found |= chosen
    return found


def misfits(preset: Preset, setup: Setup, request: Request) -> list[str]:
    """Say where features and data are not those that the preset was made with."""
    told = [*_data_misfits(preset, setup), *_feature_misfits(preset, setup)]
    n_images, asked = setup.recipe.batch_size, request.batch_size
    if asked is not None and n_images != asked:
        told.append(f"Batches have {n_images} images, not {asked}: there are no more.")
    return told


def _data_misfits(preset: Preset, setup: Setup) -> list[str]:
    pairs = [pair for part in setup.selection.parts().values() for pair in part]
    labels = setup.labels
    formats = {
        labels.format_of(name).partition(".")[0] for name in {pair.dataset for pair in pairs}
    }
    told = []
    for name in sorted(formats - set(preset.data)):
        expected = " or ".join(preset.data)
        told.append(f"This is not the paper's data: its format is {name}, not {expected}.")
    n_train = len({(pair.item, pair.image_key) for pair in setup.selection.train})
    expected_n = preset.train_images
    if expected_n is not None and abs(n_train - expected_n) > _CLOSE * expected_n:
        told.append(f"It learns from {n_train:,} images, the paper from {expected_n:,}.")
    if not setup.selection.test:
        told.append(
            "There is no split test: what is measured is the held-out part, by which the weights "
            f"are chosen too. The paper measures {preset.test_data}."
        )
    return told


def _feature_misfits(preset: Preset, setup: Setup) -> list[str]:
    plan, needs = setup.features.plan, preset.needs
    if plan is None:
        return ["These features were imported, so nothing tells whether they are the paper's."]
    entry = CATALOGUE[needs.backbone]
    expected = {
        "backbone": entry.timm_name,
        "image size": needs.image_size,
        "resize": _shortest(needs.resize, plan),
        "dtype": needs.dtype,
        "tap": ", ".join(needs.taps),
    }
    found = {
        "backbone": f"{plan.architecture}.{plan.tag}",
        "image size": plan.image_size,
        "resize": plan.resize,
        "dtype": plan.dtype,
        "tap": ", ".join(_sorted(needs, setup.model.tap_names)),
    }
    return [
        f"The features' {name} is {_text(found[name])}, not {_text(value)}."
        for name, value in expected.items()
        if found[name] != value
    ]


def _sorted(needs: Needs, taps: Collection[str]) -> tuple[str, ...]:
    """Give taps in the order of what is needed, where they are the same."""
    return needs.taps if set(taps) == set(needs.taps) else tuple(taps)


def _shortest(resize: str, plan: ExtractPlan) -> str:
    """Write a rule as a plan with the same interpolation stores it."""
    return replace(plan, resize=resize).resize


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)

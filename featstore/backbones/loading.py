"""Making timm models: names, sizes and weights."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, split_model_name_tag
from timm.models._hub import load_model_config_from_path

from featstore.backbones.hub import fetch, weight_names
from featstore.backbones.lite0 import load_lite0
from featstore.backbones.weights import (
    check_complete,
    check_patch,
    fill_layer_scale,
    first_line,
    noted_loads,
    parse_random,
    read_shapes,
)
from featstore.catalogue import CATALOGUE, BackboneEntry, find
from featstore.errors import InvalidInputError, NotFoundError, invalid

SIZE_ERRORS = (AssertionError, RuntimeError, ValueError, TypeError)
"""What timm raises for an input size that a model cannot take."""

_LOAD_ERRORS = (*SIZE_ERRORS, KeyError, AttributeError, IndexError, OSError)
_FOLDER_NAMES = (*weight_names(""), *weight_names("open_clip_pytorch_model.bin"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """What a name stands for, before any weights are loaded."""

    name: str  # as the user wrote it
    architecture: str
    tag: str  # timm's tag, "hf-hub:...", or "local-dir"
    config: PretrainedCfg
    arguments: dict[str, Any]  # of the model, from the config.json of a page or a folder
    stride: int  # pixels that an input's sides must be a multiple of
    default_side: int
    licence: str
    page: str = ""  # of the hub
    folder: Path | None = None  # of a local-dir
    package: str = ""

    @property
    def native_hw(self) -> tuple[int, int]:
        """Height and width that the model was made for."""
        return (int(self.config.input_size[-2]), int(self.config.input_size[-1]))

    def input_hw(self, image_size: tuple[int, int] | None) -> tuple[int, int]:
        """Check an image size, or choose one.

        Raises:
            InvalidInputError: It is no multiple of the patch.
        """
        if image_size is None:
            return (self.default_side, self.default_side)
        if image_size == self.native_hw:
            return image_size
        for side in image_size:
            if side < 1 or side % self.stride:
                lower = max(side // self.stride, 1) * self.stride
                near = sorted({lower, max(-(-side // self.stride), 1) * self.stride})
                raise invalid(
                    "image_size",
                    "x".join(str(one) for one in image_size),
                    f"a multiple of {self.stride}, the patch of {self.architecture}",
                    hint=f"Near {side}: {' or '.join(str(one) for one in near)}; or --resize pad.",
                )
        return image_size

    def create(self, hw: tuple[int, int], **options: Any) -> Any:
        """Make the timm model for an input size."""
        options = {**self.arguments, **options}
        if self.config.fixed_input_size:
            options["img_size"] = hw
        if "pretrained_cfg" not in options:
            options["pretrained_cfg"] = dataclasses.asdict(self.config)
        return timm.create_model(self.architecture, **options)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A timm model in eval mode with what was asked for."""

    blueprint: Blueprint
    model: Any  # nn.Module; timm's methods are not typed
    tag: str  # timm's tag, "file" or "random:SEED"
    source: str  # for provenance: hub page, file, package or seed
    input_hw: tuple[int, int]
    licence: str  # of the weights; "" where it is not known


def load_model(
    name: str, *, image_size: tuple[int, int] | None, weights: str | Path | None
) -> LoadedModel:
    """Make the model `name` at an input size, with its weights loaded strictly.

    Raises:
        NotFoundError: The name is unknown, or its weights are not at hand.
        InvalidInputError: The size or the weights do not fit.
    """
    blueprint = read_name(name)
    hw = blueprint.input_hw(image_size)
    seed = None if weights is None else parse_random(str(weights))
    licence = ""
    if seed is not None:
        model, tag = _random(blueprint, hw, seed), f"random:{seed}"
        source = tag
    elif weights is not None:
        model, tag = _from_file(blueprint, hw, Path(weights)), "file"
        source = str(Path(weights).absolute())
    else:
        model, source = _published(blueprint, hw)
        tag, licence = blueprint.tag, blueprint.licence
    return LoadedModel(
        blueprint=blueprint,
        model=model.eval(),
        tag=tag,
        source=source,
        input_hw=hw,
        licence=licence,
    )


def read_name(name: str) -> Blueprint:
    """Find out what a backbone's name stands for.

    Raises:
        NotFoundError: It stands for nothing.
        InvalidInputError: It names a page or a folder that is no timm model.
    """
    kind, _, place = name.partition(":")
    if kind in ("hf-hub", "local-dir"):
        return _read_remote(name, kind, place)
    entry = find(name)
    timm_name = entry.timm_name if entry is not None else name
    architecture, tag = split_model_name_tag(timm_name)
    if not is_model(architecture) or (entry is None and not _is_registry_name(name)):
        raise _unknown(name)
    config = _config(timm_name, architecture)
    if entry is not None:
        return _from_entry(entry, architecture, config, tag)
    return _measured(
        Blueprint(
            name=name,
            architecture=architecture,
            tag=str(config.tag or ""),
            config=config,
            arguments={},
            stride=0,
            default_side=0,
            licence=str(config.license or ""),
            page=str(config.hf_hub_id or ""),
        )
    )


def _is_registry_name(name: str) -> bool:
    return not any(character in name for character in "/\\:")


def _unknown(name: str) -> NotFoundError:
    """Offer the nearest names of the catalogue and of timm."""
    names = [*CATALOGUE, *timm.list_models(), *timm.list_models(pretrained=True)]
    nearest = difflib.get_close_matches(name, names, n=3)
    guess = f" Did you mean {' or '.join(repr(one) for one in nearest)}?" if nearest else ""
    return NotFoundError(
        f"Unknown backbone {name!r}.{guess} Known short names: {', '.join(sorted(CATALOGUE))}; "
        "any timm name with its tag, hf-hub:ORG/REPO and local-dir:PATH work too."
    )


def _config(timm_name: str, architecture: str) -> PretrainedCfg:
    try:
        config = get_pretrained_cfg(timm_name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        raise NotFoundError(
            f"timm has no weights named {timm_name!r}. It has: {', '.join(tags) or 'none'}."
        ) from error
    return config or PretrainedCfg(architecture=architecture)


def _from_entry(
    entry: BackboneEntry, architecture: str, config: PretrainedCfg, tag: str
) -> Blueprint:
    if entry.mean:
        config = dataclasses.replace(config, mean=entry.mean, std=entry.std)
    is_package = entry.hub.startswith("package:")
    filename = ""
    page = str(config.hf_hub_id or "")
    if entry.hub and not is_package:
        page, _, filename = entry.hub.partition(":")
        config = dataclasses.replace(config, hf_hub_id=page, hf_hub_filename=filename)
    return Blueprint(
        name=entry.name,
        architecture=architecture,
        tag=page if filename else tag,
        config=config,
        arguments={},
        stride=entry.stride,
        default_side=entry.default_size,
        licence=entry.licence,
        page=page,
        package=entry.hub if is_package else "",
    )


def _read_remote(name: str, kind: str, place: str) -> Blueprint:
    """Read the config.json of a folder or of a page of the hub."""
    if kind == "local-dir":
        folder = Path(place)
        if not (folder / "config.json").is_file():
            raise NotFoundError(
                f"No config.json in {place}. A local-dir: needs config.json and weights."
            )
    else:
        folder = fetch(place, ["config.json"], name=name).parent
    try:
        values, architecture, arguments = load_model_config_from_path(folder)
        config = PretrainedCfg(**{**values, "source": None, "file": None, "hf_hub_id": place})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(
            f"{folder / 'config.json'} describes no timm model: {first_line(error)}. It needs at "
            "least the architecture."
        ) from error
    if not is_model(architecture):
        raise InvalidInputError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which this timm "
            "does not have."
        )
    return _measured(
        Blueprint(
            name=name,
            architecture=architecture,
            # Where a folder lies decides no number: the hash of the weights tells it apart.
            tag="local-dir" if kind == "local-dir" else name,
            config=config,
            arguments={k: v for k, v in arguments.items() if k not in ("img_size", "num_classes")},
            stride=0,
            default_side=0,
            licence=str(config.license or ""),
            page=place if kind == "hf-hub" else "",
            folder=folder if kind == "local-dir" else None,
        )
    )


def _measured(blueprint: Blueprint) -> Blueprint:
    """Complete a blueprint with the stride and default size, read off a model without numbers.

    Raises:
        InvalidInputError: The model gives no intermediate outputs.
    """
    native = blueprint.native_hw
    with torch.device("meta"):
        try:
            model = blueprint.create(native, pretrained=False, num_classes=0)
        except TypeError as error:
            raise InvalidInputError(
                f"{blueprint.name} does not load: {first_line(error)}. Use another backbone."
            ) from error
    if not hasattr(model, "forward_intermediates"):
        raise InvalidInputError(
            f"{blueprint.architecture} gives no intermediate outputs in timm. Use another backbone."
        )
    stride = max(int(level["reduction"]) for level in model.feature_info)
    side = max(round(224 / stride), 1) * stride
    if native == (224, 224) or not _takes(blueprint, (side, side)):
        side = native[0]
    return dataclasses.replace(blueprint, stride=stride, default_side=side)


def _takes(blueprint: Blueprint, hw: tuple[int, int]) -> bool:
    """Tell whether a model takes images of a size, without computing anything."""
    with torch.device("meta"), torch.inference_mode():
        try:
            model = blueprint.create(hw, pretrained=False, num_classes=0).eval()
            model.forward_intermediates(torch.zeros(1, 3, *hw), intermediates_only=True)
        except SIZE_ERRORS:
            return False
    return True


def _random(blueprint: Blueprint, hw: tuple[int, int], seed: int) -> Any:
    """Initialise from a seed, leaving the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = blueprint.create(hw, pretrained=False, num_classes=0)
    fill_layer_scale(model)
    return model


def _from_file(blueprint: Blueprint, hw: tuple[int, int], path: Path) -> Any:
    """Load a file through timm's own key filter; every tensor must find its place."""
    shapes = read_shapes(path)
    overlay = {"file": str(path), "num_classes": 0, "label_offset": 0, "source": None}
    with noted_loads() as notes:
        try:
            model = blueprint.create(
                hw, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
            )
        except _LOAD_ERRORS as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InvalidInputError(
                f"{path} does not fit {blueprint.architecture}: {reason}. Give the weights of this "
                "architecture, whole."
            ) from error
    check_patch(model, shapes, path, blueprint.architecture)
    classifier = blueprint.config.classifier or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for left_out in notes[-1:]:
        check_complete(left_out, classifiers, path, blueprint.architecture)
    if not notes:
        raise InvalidInputError(f"timm did not load {path} into {blueprint.architecture}.")
    return _headless(model)


def _published(blueprint: Blueprint, hw: tuple[int, int]) -> tuple[Any, str]:
    """Load the published weights from a package, a folder, the hub's cache or the hub."""
    if blueprint.package:
        model = blueprint.create(
            hw, pretrained=False, num_classes=int(blueprint.config.num_classes)
        )
        load_lite0(model)
        return _headless(model), blueprint.package
    if blueprint.folder is not None:
        path = _weights_in(blueprint.folder)
        return _from_file(blueprint, hw, path), str(path.absolute())
    if not blueprint.page:
        where = f" on the hub, but at {blueprint.config.url}" if blueprint.config.url else ""
        raise NotFoundError(
            f"timm publishes no weights for {blueprint.name}{where}. Give a file with --weights "
            "FILE, or --weights random."
        )
    names = weight_names(str(blueprint.config.hf_hub_filename or ""))
    path = fetch(blueprint.page, names, name=blueprint.name)
    return _from_file(blueprint, hw, path), f"hf-hub:{blueprint.page}"


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in _FOLDER_NAMES if (folder / name).is_file()]
    found = found or sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")])
    if not found:
        raise NotFoundError(f"No weights in {folder}. Put model.safetensors beside config.json.")
    return found[0]


def _headless(model: Any) -> Any:
    """Drop the classifier, so that equal backbones hash alike with and without one."""
    model.reset_classifier(0)
    return model

"""Making timm models: names, sizes and weights, strictly."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, split_model_name_tag

from featstore.backbones.weights import (
    check_reachable,
    file_attempts,
    fill_layer_scale,
    load_lite0,
    parse_random,
    read_checkpoint_keys,
    unreachable,
    wrong_file,
)
from featstore.catalogue import CATALOGUE, BackboneEntry, find
from featstore.errors import InvalidInputError, NotFoundError, invalid


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A timm model in eval mode with what was asked for."""

    name: str  # as the user wrote it
    model: Any  # nn.Module; timm's methods are not typed
    config: Any  # timm's pretrained configuration
    architecture: str
    tag: str  # timm's tag, "file" or "random:SEED"
    source: str  # for provenance: hub page, file, package or seed
    input_hw: tuple[int, int]
    licence: str


def load_model(
    name: str, *, image_size: tuple[int, int] | None, weights: str | Path | None
) -> LoadedModel:
    """Make the model `name` at an input size, with its weights loaded strictly.

    Raises:
        NotFoundError: The name is unknown, or its weights are not at hand.
        InvalidInputError: The size or the weights do not fit.
    """
    entry = find(name)
    is_remote = name.startswith(("hf-hub:", "local-dir:"))
    if is_remote:
        return _load_remote(name, image_size, weights)
    timm_name = entry.timm_name if entry is not None else name
    architecture, tag = split_model_name_tag(timm_name)
    if not is_model(architecture):
        raise _unknown(name)
    config = _config(timm_name, architecture)
    hw = _input_hw(config, entry, architecture, image_size)
    maker = _Maker(name, architecture, config, hw)
    seed = None if weights is None else parse_random(str(weights))
    if seed is not None:
        return maker.random(seed)
    if weights is not None:
        return maker.file(Path(weights))
    return maker.published(entry, tag or _default_tag(config))


def _unknown(name: str) -> NotFoundError:
    """Offer the nearest names of the catalogue and of timm."""
    names = [*CATALOGUE, *timm.list_models(), *timm.list_models(pretrained=True)]
    nearest = difflib.get_close_matches(name, names, n=3)
    guess = f" Did you mean {' or '.join(repr(one) for one in nearest)}?" if nearest else ""
    return NotFoundError(
        f"Unknown backbone {name!r}.{guess} Known short names: {', '.join(sorted(CATALOGUE))}; "
        "any timm name with its tag, hf-hub:ORG/REPO and local-dir:PATH work too."
    )


def _config(timm_name: str, architecture: str) -> Any:
    try:
        return get_pretrained_cfg(timm_name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        raise NotFoundError(
            f"timm has no weights named {timm_name!r}. It has: {', '.join(tags) or 'none'}."
        ) from error


def _default_tag(config: Any) -> str:
    return str(config.tag or "")


def stride_of(config: Any, entry: BackboneEntry | None, architecture: str) -> int:
    """Give the pixels that an input's sides must be a multiple of."""
    if entry is not None:
        return entry.stride
    with torch.device("meta"):
        model: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    return max(int(level["reduction"]) for level in model.feature_info)


def _input_hw(
    config: Any, entry: BackboneEntry | None, architecture: str, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    stride = stride_of(config, entry, architecture)
    if image_size is None:
        side = entry.default_size if entry is not None else round(224 / stride) * stride
        return (side, side)
    for side in image_size:
        if side < 1 or side % stride:
            lower, upper = side // stride * stride, -(-side // stride) * stride
            near = " or ".join(str(one) for one in sorted({lower, upper} - {0}))
            raise invalid(
                "image_size",
                "x".join(str(one) for one in image_size),
                f"a multiple of {stride}, the patch of {architecture}",
                hint=f"Near {side} are {near}; --resize pad pads.",
            )
    return image_size


class _Maker:
    """Makes one architecture at one size from different weights."""

    def __init__(self, name: str, architecture: str, config: Any, hw: tuple[int, int]) -> None:
        self.name = name
        self.architecture = architecture
        self.config = config
        self.hw = hw

    def random(self, seed: int) -> LoadedModel:
        """Initialise from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._create(pretrained=False, num_classes=0)
        fill_layer_scale(model)
        return self._done(model, f"random:{seed}", f"random:{seed}")

    def file(self, path: Path) -> LoadedModel:
        """Load a file through timm's own key filter; every tensor must fit."""
        keys = read_checkpoint_keys(path)
        classifier = str(self.config.classifier or "")
        errors: list[BaseException] = []
        for n_classes in file_attempts(self.config.num_classes, classifier, keys):
            overlay = {"file": str(path), "num_classes": n_classes}
            try:
                model = self._create(
                    pretrained=True, num_classes=n_classes, pretrained_cfg_overlay=overlay
                )
            except (RuntimeError, KeyError, AssertionError, AttributeError, TypeError) as error:
                errors.append(error)
                continue
            return self._done(_headless(model), "file", str(path.absolute()))
        raise wrong_file(path, self.architecture, errors[0]) from errors[0]

    def published(self, entry: BackboneEntry | None, tag: str) -> LoadedModel:
        """Load the published weights of a tag from the hub's cache, the hub, or a package."""
        if entry is not None and entry.hub.startswith("package:"):
            model = self._create(pretrained=False, num_classes=self.config.num_classes)
            load_lite0(model)
            return self._done(_headless(model), tag, entry.hub)
        overlay: dict[str, Any] = {}
        page = str(self.config.hf_hub_id or "")
        filename = str(self.config.hf_hub_filename or "model.safetensors")
        if entry is not None and entry.hub:
            page, _, filename = entry.hub.partition(":")
            # The image tower's projection is timm's head: its width decides `num_classes`.
            overlay = {"hf_hub_id": page, "hf_hub_filename": filename, "num_classes": 768}
            tag = page
        if not page:
            raise NotFoundError(
                f"timm publishes no weights for {self.name}. Give a file with --weights FILE, or "
                "--weights random."
            )
        check_reachable(page, filename, self.name)
        n_classes = overlay.get("num_classes", self.config.num_classes)
        architecture = self.architecture if overlay else f"{self.architecture}.{tag}"
        try:
            model = self._create(
                pretrained=True,
                num_classes=n_classes,
                pretrained_cfg_overlay=overlay or None,
                architecture=architecture,
            )
        except OSError as error:
            raise unreachable(self.name, page) from error
        return self._done(_headless(model), tag, f"hf-hub:{page}")

    def _create(self, *, architecture: str | None = None, **options: Any) -> Any:
        if self.config.fixed_input_size:
            options["img_size"] = self.hw
        return timm.create_model(architecture or self.architecture, **options)

    def _done(self, model: Any, tag: str, source: str) -> LoadedModel:
        return LoadedModel(
            name=self.name,
            model=model.eval(),
            config=self.config,
            architecture=self.architecture,
            tag=tag,
            source=source,
            input_hw=self.hw,
            licence=str(self.config.license or ""),
        )


def _headless(model: Any) -> Any:
    """Drop the classifier, so that equal backbones hash alike with and without one."""
    model.reset_classifier(0)
    return model


def _load_remote(
    name: str, image_size: tuple[int, int] | None, weights: str | Path | None
) -> LoadedModel:
    """Load `hf-hub:ORG/REPO[@REVISION]` or `local-dir:PATH`; a config there names the rest."""
    if weights is not None:
        raise InvalidInputError(
            f"{name} brings its own weights; --weights {weights} would be ignored. Leave it out."
        )
    kind, _, place = name.partition(":")
    if kind == "local-dir" and not (Path(place) / "config.json").is_file():
        raise NotFoundError(
            f"No config.json in {place}. A local-dir: needs config.json and weights."
        )
    if kind == "hf-hub":
        check_reachable(place.partition("@")[0], "config.json", name)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        model: Any = timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError, TypeError) as error:
        raise InvalidInputError(
            f"{name} does not load: {' '.join(str(error).split())[:300]}"
        ) from error
    config = model.pretrained_cfg
    hw = image_size or (config["input_size"][1], config["input_size"][2])
    return LoadedModel(
        name=name,
        model=_headless(model).eval(),
        config=_Config(config),
        architecture=str(config["architecture"]),
        tag=name,
        source=name,
        input_hw=hw,
        licence=str(config.get("license") or ""),
    )


class _Config:
    """Attribute access to a configuration that timm gives as a dict."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

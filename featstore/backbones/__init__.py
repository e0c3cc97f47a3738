"""timm behind one contract: load, fingerprint, and run a frozen backbone to its taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from featstore.backbones.loading import SIZE_ERRORS, LoadedModel, load_model, read_name
from featstore.backbones.parts import (
    FinalNormWeights,
    final_norm,
    position_rule,
    prefix_order,
)
from featstore.backbones.tail import choose_tail
from featstore.backbones.weights import first_line, state_arrays
from featstore.errors import InvalidInputError, invalid
from featstore.hashing import tensors_hash
from featstore.taps import base_tap, default_taps, parse_tap, resolve_taps
from featstore.types import TapShape

__all__ = [
    "Backbone",
    "FinalNormWeights",
    "load_backbone",
    "load_from_identity",
    "padded_size",
    "resolve_device",
]


class Backbone:
    """A frozen backbone that turns uint8 images into taps; made by `load_backbone`."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: str,
        taps: Sequence[str] | None,
        tail: int | str | None = None,
    ) -> None:
        model: Any = loaded.model.requires_grad_(False)
        blueprint = loaded.blueprint
        levels = [(int(one["num_chs"]), int(one["reduction"])) for one in model.feature_info]
        self.name = blueprint.name
        self.architecture = blueprint.architecture
        self.tag = loaded.tag
        self.weights_source = loaded.source
        self.licence = loaded.licence
        self.input_hw = loaded.input_hw
        self.device = device
        self.unit = "block" if len(set(levels)) == 1 and len(levels) > 1 else "stage"
        self.depth = len(levels)
        self.width, self.stride = levels[-1]
        self.prefix_order = prefix_order(model) if self.unit == "block" else ()
        self.n_prefix = len(self.prefix_order)
        self.mean = tuple(float(value) for value in blueprint.config.mean)
        self.std = tuple(float(value) for value in blueprint.config.std)
        self.interpolation = str(blueprint.config.interpolation)
        self.position_grid = position_rule(model, blueprint.native_hw, self.input_hw)
        # The whole model is hashed: which taps are asked for must not change the key.
        self.weights_sha256 = tensors_hash(state_arrays(model))
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._norm = final_norm(model) if self.unit == "block" else None
        self.taps = self._resolved(taps)
        self.tail, self.tail_note = choose_tail(  # before blocks are dropped
            model,
            tail,
            taps=self.taps,
            depth=self.depth,
            architecture=self.architecture,
            n_prefix=self.n_prefix,
            norm=self._norm,
        )
        self._indices = self._needed_indices()
        model.prune_intermediate_layers(self._indices, prune_norm=False)
        # Convolutions run faster, and tokens come out in their stored order without a copy.
        self._memory = torch.channels_last if self.unit == "stage" else torch.contiguous_format
        self.model = model.to(device, memory_format=self._memory)
        if self._norm is not None:
            self._norm = self._norm.to(device)
        self._mean = torch.tensor(self.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(self.std, device=device).view(1, 3, 1, 1)
        self._format = "NCHW"
        try:
            self.tap_shapes = self._dry_shapes()
        except SIZE_ERRORS as error:
            raise self._refused_size(error, blueprint.native_hw) from error

    def _resolved(self, taps: Sequence[str] | None) -> tuple[str, ...]:
        """Check the taps, or choose the default ones.

        Raises:
            InvalidInputError: One does not exist here.
        """
        wanted = default_taps(unit=self.unit, depth=self.depth) if taps is None else taps
        if taps is None and self._norm is None:
            wanted = tuple(tap for tap in wanted if tap != "norm")
        n_cls = int(self.prefix_order[:1] == ("cls",))
        resolved = resolve_taps(wanted, unit=self.unit, depth=self.depth, n_prefix=n_cls)
        if self._norm is None and any(base_tap(tap) == "norm" for tap in resolved):
            raise invalid("tap", "norm", f"one that {self.architecture} has; it has no final norm")
        return resolved

    def _refused_size(self, error: Exception, native: tuple[int, int]) -> InvalidInputError:
        height, width = self.input_hw
        return InvalidInputError(
            f"{self.architecture} does not take images of {height}x{width} pixels "
            f"({first_line(error)}). Its own size is "
            f"{native[0]}x{native[1]}: --image-size {native[0]}."
        )

    def _needed_indices(self) -> list[int]:
        numbers = {parse_tap(tap).index for tap in self.taps}
        return sorted({self.depth - 1 if number is None else number for number in numbers})

    @torch.inference_mode()
    def forward(self, images_bhwc: np.ndarray) -> dict[str, torch.Tensor]:
        """Run one batch.

        Args:
            images_bhwc: (batch, height, width, 3) uint8 RGB of `input_hw`.

        Returns:
            Float32 tensors on the device: "TAP" (batch, tokens, dim), row-major over the grid,
            or (batch, dim) for a pooled tap; "TAP/prefix" (batch, prefix tokens, dim).
        """
        pixels = torch.from_numpy(images_bhwc)
        if self.device.startswith("cuda"):
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        else:
            pixels = pixels.to(self.device)
        images = pixels.permute(0, 3, 1, 2).contiguous(memory_format=self._memory).float()
        images = images.div_(255).sub_(self._mean).div_(self._std)
        return self._collect(self._intermediates(images, self._format))

    def _intermediates(self, images_bchw: torch.Tensor, output_format: str) -> dict[int, Any]:
        """Run timm's model: block or stage number -> map, or (map, prefix tokens)."""
        options = {"return_prefix_tokens": True} if self.n_prefix else {}
        outputs = self.model.forward_intermediates(
            images_bchw,
            indices=self._indices,
            norm=False,
            intermediates_only=True,
            output_fmt=output_format,
            **options,
        )
        return dict(zip(self._indices, outputs, strict=True))

    def _collect(self, outputs: Mapping[int, Any]) -> dict[str, torch.Tensor]:
        """Turn timm's outputs into the taps asked for."""
        dense: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for tap in sorted({base_tap(tap) for tap in self.taps}):
            index = parse_tap(tap).index
            output = outputs[self.depth - 1 if index is None else index]
            spatial, prefix = output if isinstance(output, tuple) else (output, None)
            patch = spatial if spatial.ndim == 3 else spatial.flatten(2).transpose(1, 2)
            if index is None and self._norm is not None:
                patch = self._norm(patch)
                prefix = None if prefix is None else self._norm(prefix)
            dense[tap] = (patch.contiguous(), prefix)
        collected: dict[str, torch.Tensor] = {}
        for tap in self.taps:
            patch, prefix = dense[base_tap(tap)]
            if tap.endswith(".cls") and prefix is not None:
                collected[tap] = prefix[:, 0].contiguous()
            elif tap.endswith(".mean"):
                collected[tap] = patch.mean(dim=1)
            else:
                collected[tap] = patch
                if prefix is not None:
                    collected[f"{tap}/prefix"] = prefix.contiguous()
        return collected

    def _dry_shapes(self) -> dict[str, TapShape]:
        """Run one noise image: the grid is read off, the operations are counted."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, 3, *self.input_hw, generator=generator).to(self.device)
        counter = FlopCounterMode(display=False)
        with torch.inference_mode(), counter:
            outputs = self._intermediates(images, "NCHW")
        self.flops_per_image = float(counter.get_total_flops())
        collected = self._collect(outputs)
        if self.unit == "block" and self._gives_tokens(images, collected):
            self._format = "NLC"
        shapes = {}
        for tap in self.taps:
            index = parse_tap(tap).index
            output = outputs[self.depth - 1 if index is None else index]
            spatial = output[0] if isinstance(output, tuple) else output
            is_pooled = collected[tap].ndim == 2
            prefix = collected.get(f"{tap}/prefix")
            shapes[tap] = TapShape(
                tap=tap,
                dim=int(collected[tap].shape[-1]),
                grid=None if is_pooled else (int(spatial.shape[-2]), int(spatial.shape[-1])),
                n_prefix=0 if prefix is None else int(prefix.shape[1]),
            )
        return shapes

    @torch.inference_mode()
    def _gives_tokens(self, images: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> bool:
        """Tell whether the model gives tokens itself, row-major: maps cost two copies more."""
        try:
            found = self._collect(self._intermediates(images, "NLC"))
        except AssertionError:
            return False
        return all(torch.allclose(found[tap], value) for tap, value in expected.items())

    @property
    def final_norm(self) -> FinalNormWeights | None:
        """The final norm's numbers, or None where there is none (or a kind without a name here)."""
        norm = self._norm
        if norm is None:
            return None
        name = type(norm).__name__.lower()
        kind = "rms_norm" if "rms" in name else "layer_norm" if "layernorm" in name else None
        if kind is None:
            return None
        bias = getattr(norm, "bias", None)
        return FinalNormWeights(
            kind=kind,
            eps=float(norm.eps),
            weight=norm.weight.detach().float().cpu().numpy(),
            bias=None if bias is None else bias.detach().float().cpu().numpy(),
        )

    @property
    def library_versions(self) -> dict[str, str]:
        """Versions of what computes the numbers: provenance, not part of any key."""
        return {name: version(name) for name in ("torch", "timm", "numpy", "pillow")}

    def identity(self) -> dict[str, Any]:
        """Give what tells this backbone from others, as JSON; see `load_from_identity`."""
        return {
            "name": self.name,
            "architecture": self.architecture,
            "tag": self.tag,
            "weights_sha256": self.weights_sha256,
            "licence": self.licence,
            "unit": self.unit,
            "depth": self.depth,
            "width": self.width,
            "stride": self.stride,
            "n_prefix": self.n_prefix,
            "n_parameters": self.n_parameters,
            "prefix_order": list(self.prefix_order),
            "input_hw": list(self.input_hw),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "position_grid": self.position_grid,
        }


def resolve_device(device: str) -> str:
    """Turn "auto" into the best device here, and check any other.

    Raises:
        InvalidInputError: The device does not exist here.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    kind, _, number = device.partition(":")
    n_devices = torch.cuda.device_count() if kind == "cuda" else 1
    if not has.get(kind, False) or (number and not (number.isdigit() and int(number) < n_devices)):
        here = ", ".join(kind for kind, is_here in has.items() if is_here)
        raise invalid("device", device, f"one of this machine's: {here}", hint="Or auto.")
    return device


def padded_size(name: str, image_size: tuple[int, int]) -> tuple[int, int]:
    """Round an image size up to whole patches of a backbone, as `--resize pad` needs."""
    stride = read_name(name).stride
    height, width = (-(-side // stride) * stride for side in image_size)
    return height, width


def load_backbone(
    name: str,
    *,
    image_size: tuple[int, int] | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    taps: Sequence[str] | None = None,
    tail: int | str | None = None,
) -> Backbone:
    """Load a frozen backbone, blocks after the last tap dropped.

    Args:
        name: Name of the catalogue, timm name with its tag, ``hf-hub:...`` or ``local-dir:...``.
        image_size: Height and width in pixels, multiples of the patch; None: about 224.
        weights: File, "random[:SEED]", or None for the published weights.
        device: "auto", "cpu", "cuda[:N]" or "mps".
        taps: Taps; None: four blocks and the final norm, or all stages.
        tail: Last blocks to keep the weights of, or "auto": as many, up to 4, as a tap feeds.

    Raises:
        NotFoundError: Unknown name, or weights that are not at hand.
        InvalidInputError: A size, a tap, a device or weights that do not fit; or a tail that
            cannot be had, and why.
    """
    chosen = resolve_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    loaded = load_model(name, image_size=image_size, weights=weights)
    return Backbone(loaded, device=chosen, taps=taps, tail=tail)


def load_from_identity(
    identity: Mapping[str, Any],
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    taps: Sequence[str] | None = None,
) -> Backbone:
    """Load the very backbone that a feature set was made with.

    Args:
        identity: What `Backbone.identity` gave.
        weights: File or "random[:SEED]", where the weights were not published ones.
        device: As in `load_backbone`.
        taps: As in `load_backbone`.

    Raises:
        NotFoundError: As in `load_backbone`.
        InvalidInputError: The weights at hand are others, or a file is needed and not given.
    """
    name, tag = str(identity["name"]), str(identity["tag"])
    if weights is None and tag.startswith("random:"):
        weights = tag
    if weights is None and tag == "file":
        raise InvalidInputError(
            f"The backbone {name} came from a weights file. Name it: --weights FILE."
        )
    if name == identity["architecture"] and weights is None and tag:
        name = f"{name}.{tag}"  # timm's default tag may change
    height, width = identity["input_hw"]
    backbone = load_backbone(
        name, image_size=(height, width), weights=weights, device=device, taps=taps
    )
    found = backbone.identity()
    if found["weights_sha256"] != identity["weights_sha256"]:
        raise InvalidInputError(
            f"The weights at hand hash to {found['weights_sha256'][:12]}, and the features were "
            f"made with {str(identity['weights_sha256'])[:12]}. Name the right file: "
            "--weights FILE."
        )
    for field in ("architecture", "mean", "std", "interpolation", "position_grid"):
        if found[field] != identity[field]:
            raise InvalidInputError(
                f"The backbone {name} has {field} {found[field]!r} here, and the features were "
                f"made with {identity[field]!r}. Install the timm version that they name."
            )
    return backbone

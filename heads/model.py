"""A head with all that it needs around it: its task, its taps and the backbone's final norm.

``head.safetensors`` in a run folder holds the weights of the head (``head.*``) and, where it was
applied, the final norm (``final_norm.*``), so that a run folder can be used without its store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from featstore.errors import FormatError, NotFoundError, invalid, not_found
from featstore.feature_sets import FinalNorm
from featstore.files import write_bytes
from featstore.tail import TailSpec
from featstore.types import Placement, TapShape
from heads.base import Head, TapTokens
from heads.build import build_head
from heads.runs import WEIGHTS, Run, read_run
from heads.tasks import Task, build_task

_NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormTensors:
    """The backbone's final norm on the device of the head."""

    kind: str
    eps: float
    weight: Tensor
    bias: Tensor | None

    def apply(self, tokens_btd: Tensor) -> Tensor:
        """Normalise over the last axis, in float32."""
        shape = (tokens_btd.shape[-1],)
        if self.kind == "rms_norm":
            normed = F.rms_norm(tokens_btd, shape, self.weight, self.eps)
            return normed if self.bias is None else normed + self.bias
        return F.layer_norm(tokens_btd, shape, self.weight, self.bias, self.eps)


class Model:
    """A head ready for tokens as they lie in a store, or as a backbone gives them."""

    def __init__(
        self, *, head: Head, task: Task, taps: Sequence[TapShape], norm: NormTensors | None
    ) -> None:
        self.head = head
        self.task = task
        self.taps = tuple(taps)
        self.norm = norm

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Taps that the head reads, each once."""
        return tuple(dict.fromkeys(shape.tap for shape in self.taps))

    @property
    def array_names(self) -> tuple[str, ...]:
        """Arrays that the head reads: "TAP", and "TAP/prefix" where the tap has prefix tokens."""
        names = []
        for shape in self.taps:
            names += [shape.tap, f"{shape.tap}/prefix"] if shape.n_prefix else [shape.tap]
        return tuple(dict.fromkeys(names))

    @property
    def normed_taps(self) -> tuple[str, ...]:
        """Taps that the final norm is applied to, each once."""
        normed = [shape.tap for number, shape in enumerate(self.taps) if self._is_normed(number)]
        return tuple(dict.fromkeys(normed))

    def read_from(self, stored: Mapping[str, TapShape]) -> None:
        """Read the same taps of another feature set from now on, whose grids may be others.

        Raises:
            NotFoundError: It lacks a tap.
            InvalidInputError: A tap has another width or number of prefix tokens.
        """
        for shape in self.taps:
            if shape.tap not in stored:
                raise not_found("tap", shape.tap, stored)
            other = stored[shape.tap]
            if (other.dim, other.n_prefix) != (shape.dim, shape.n_prefix) or other.grid is None:
                expected = f"{shape.dim} wide with {shape.n_prefix} prefix tokens"
                raise invalid("tap", other, expected, hint="Choose another --feature-set.")
        self.taps = tuple(stored[shape.tap] for shape in self.taps)
        self.head.read_grids(self.taps)

    @property
    def device(self) -> torch.device:
        """Where the head computes."""
        return next(self.head.parameters()).device

    def tokens(
        self, arrays: Mapping[str, Tensor], placements: Sequence[Placement | None]
    ) -> list[TapTokens]:
        """Make the head's input: cast to float32, norm block outputs, mark padding.

        Args:
            arrays: "TAP" (batch, tokens, dim) and perhaps "TAP/prefix", on the head's device.
            placements: How each image was drawn into the input; None where nobody knows.
        """
        inputs = []
        for number, shape in enumerate(self.taps):
            assert shape.grid is not None
            prefix = arrays.get(f"{shape.tap}/prefix")
            inputs.append(
                TapTokens(
                    patch=self._normed(number, arrays[shape.tap]),
                    grid=shape.grid,
                    prefix=None if prefix is None else self._normed(number, prefix),
                    valid=valid_tokens(placements, shape.grid, self.device),
                )
            )
        return inputs

    def _is_normed(self, number: int) -> bool:
        """Tell whether the final norm is applied: to blocks, but those that a head wants raw."""
        is_block = self.taps[number].tap.startswith("block:")
        return self.norm is not None and is_block and number not in self.head.raw_inputs

    def _normed(self, number: int, tokens_btd: Tensor) -> Tensor:
        tokens_btd = tokens_btd.float()
        if self.norm is None or not self._is_normed(number):
            return tokens_btd
        return self.norm.apply(tokens_btd)

    @torch.inference_mode()
    def predict(
        self, arrays: Mapping[str, Any], placements: Sequence[Placement | None] | None = None
    ) -> np.ndarray:
        """Predict from tokens: physical values in the input frame.

        Args:
            arrays: "TAP" (batch, tokens, dim), NumPy or torch, any float dtype.
            placements: How each image was drawn into the input; None: all of it is image.

        Returns:
            (batch, channels, Ho, Wo) float32.

        Raises:
            NotFoundError: A tap that the head reads is missing.
        """
        missing = [tap for tap in self.tap_names if tap not in arrays]
        if missing:
            raise NotFoundError(
                f"The head reads {missing[0]!r}, which is not among {list(arrays)}."
            )
        tensors = {
            name: torch.as_tensor(arrays[name]).to(self.device)
            for name in self.array_names
            if name in arrays
        }
        batch = len(tensors[self.tap_names[0]])
        was_training = self.head.training
        self.head.eval()
        output = self.head(self.tokens(tensors, placements or [None] * batch))
        self.head.train(was_training)
        return self.task.predict(output).float().cpu().numpy()


def valid_tokens(
    placements: Sequence[Placement | None], grid: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Mark the tokens whose centre lies on the image; None where no input has padding.

    Returns:
        (batch, tokens) bool, at least one true a row.
    """
    if all(p is None or p.dst == (0, 0, p.input_hw[1], p.input_hw[0]) for p in placements):
        return None
    valid_bt = np.ones((len(placements), grid[0] * grid[1]), dtype=bool)
    for index, placement in enumerate(placements):
        if placement is not None:
            x0, y0, x1, y1 = placement.dst
            rows = _covered(grid[0], placement.input_hw[0], y0, y1)
            columns = _covered(grid[1], placement.input_hw[1], x0, x1)
            valid_bt[index] = (rows[:, None] & columns[None, :]).reshape(-1)
    return torch.from_numpy(valid_bt).to(device)


def _covered(n_cells: int, size: int, start: int, stop: int) -> np.ndarray:
    """Tell which of `n_cells` over `size` pixels have their centre in [start, stop)."""
    centres = (np.arange(n_cells) + 0.5) * size / n_cells
    covered = (centres >= start) & (centres < stop)
    if not covered.any():  # an image thinner than a token still touches one
        covered[min(int((start + stop) / 2 * n_cells / size), n_cells - 1)] = True
    return covered


def norm_tensors(norm: FinalNorm, device: torch.device | str) -> NormTensors:
    """Put a stored final norm on a device.

    Raises:
        InvalidInputError: It is of a kind that this version does not know.
    """
    if norm.kind not in _NORMS:
        hint = "Use --tap-norm none, or update featstore."
        raise invalid("final norm", norm.kind, "layer_norm or rms_norm", hint=hint)
    return NormTensors(
        kind=norm.kind,
        eps=norm.eps,
        weight=torch.tensor(norm.weight, dtype=torch.float32, device=device),
        bias=None
        if norm.bias is None
        else torch.tensor(norm.bias, dtype=torch.float32, device=device),
    )


def save_model(path: Path, state: Mapping[str, Tensor], norm: NormTensors | None) -> None:
    """Write ``head.safetensors`` atomically from a head's `state_dict`."""
    tensors = {f"head.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {"format": "1"}
    if norm is not None:
        metadata |= {"final_norm": norm.kind, "final_norm_eps": repr(norm.eps)}
        tensors["final_norm.weight"] = norm.weight.cpu()
        if norm.bias is not None:
            tensors["final_norm.bias"] = norm.bias.cpu()
    write_bytes(path / WEIGHTS, safetensors.torch.save(tensors, metadata))


def load(run: Run | str | Path, *, device: str = "cpu") -> Model:
    """Load the best head of a run, ready for `Model.predict`.

    Args:
        run: The run's folder, or a run from `heads.runs.find_run`.
        device: Where it shall compute: "cpu", "cuda", "mps" or "auto".

    Raises:
        NotFoundError: There is no such run, or it has no weights yet.
        FormatError: Its weights are damaged or of another head.
    """
    found = run if isinstance(run, Run) else read_run(Path(run))
    record, path = found.record, found.path / WEIGHTS
    if not path.exists():
        raise NotFoundError(f"Run {found.run_id} has no {WEIGHTS} yet; resume or repeat it.")
    place = choose_device(device)
    model = model_from_record(record)
    try:
        with safetensors.safe_open(path, framework="pt", device=str(place)) as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        model.head.load_state_dict(state)
        if "final_norm" in about:
            model.norm = NormTensors(
                kind=about["final_norm"],
                eps=float(about["final_norm_eps"]),
                weight=tensors["final_norm.weight"],
                bias=tensors.get("final_norm.bias"),
            )
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is damaged or of another head. Train it again.") from error
    model.head.to(place).eval()
    return model


def model_from_record(record: Mapping[str, Any]) -> Model:
    """Build the head and the task that ``run.json`` describes, with random weights."""
    task = build_task(record["task"], record["options"]["task"])
    shapes = {shape["tap"]: shape_from_json(shape) for shape in record["tap_shapes"]}
    # Runs of before a head could read a tap twice have no `head_taps`.
    taps = tuple(shapes[name] for name in record.get("head_taps", shapes))
    tail = record.get("tail")
    head = build_head(
        record["head"],
        taps=taps,
        n_outputs=task.readouts,
        options=record["options"]["head"],
        tail=None if tail is None else TailSpec.from_json(tail),
    )
    return Model(head=head, task=task, taps=taps, norm=None)


def shape_to_json(shape: TapShape) -> dict[str, Any]:
    """Write a tap's shape as JSON values."""
    return asdict(shape)


def shape_from_json(value: Mapping[str, Any]) -> TapShape:
    """Invert `shape_to_json`."""
    grid = value["grid"]
    return TapShape(
        tap=value["tap"],
        dim=value["dim"],
        grid=None if grid is None else (grid[0], grid[1]),
        n_prefix=value["n_prefix"],
    )


def choose_device(name: str) -> torch.device:
    """Choose where to compute; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        InvalidInputError: The device does not exist here.
    """
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, exists in kinds.items() if exists), "cpu"))
    kind, _, number = name.partition(":")
    if kind not in ("cpu", *kinds) or (number and not number.isdigit()):
        raise invalid("device", name, "auto, cpu, cuda, cuda:N or mps")
    if not kinds.get(kind, True) or (
        kind == "cuda" and int(number or 0) >= torch.cuda.device_count()
    ):
        raise invalid("device", name, "one that this machine has", hint="Try --device auto.")
    return torch.device(name)

"""A trained head as one graph that runs without this project: `torch.export` or ONNX.

The graph takes the taps as float32 tokens, applies the backbone's final norm where the run did,
and gives what `Task.predict` gives. No file is written before the graph has given, on random
tokens, the numbers that the run itself gives.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from featstore.errors import ExportError, NotFoundError, invalid
from featstore.files import write_bytes
from featstore.plan import parse_resize
from heads.evaluate import locate_run
from heads.model import Model, load
from heads.runs import Run

FORMATS = {"torch": ".pt2", "onnx": ".onnx"}
METADATA = "featstore.export.v1"
OUTPUT = "prediction"
RTOL, ATOL = 1e-4, 1e-4
_CHECKED_BATCHES = (1, 3)
_TRACED_BATCH = 2
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_PADS = ("letterbox", "pad")  # resize rules that leave a part of the input without image

Graph = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Runs an exported graph: its inputs in their order, to (batch, channels, Ho, Wo)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What `export` wrote."""

    run_id: str
    path: str
    metadata_path: str
    inputs: tuple[str, ...]  # in the order of the graph
    output_hw: tuple[int, int]
    difference: float  # the largest one found between graph and run
    note: str  # what a user of the graph should know; empty where there is nothing


def export(
    run: Run | str | Path,
    out: str | Path | None = None,
    *,
    form: str = "torch",
    queries: int | None = None,
    store: str | Path | None = None,
    runs: str | Path | None = None,
) -> ExportReport:
    """Write the best head of a run as one graph, and beside it a JSON file that describes it.

    Graph and run are compared on random tokens, one image and three: every number must agree
    within ``1e-4 + 1e-4 * |number of the run|``, else nothing is written. The batch is free, all
    other sizes are those of the run, but for the output's where `queries` says so: the graph then
    gives what `heads.evaluate` with that number measures.

    Args:
        run: A run, its folder, or with `store` or `runs` its id, the start of one, or "@last".
        out: The file; None: the run's id in the current folder.
        form: "torch" (a `torch.export` program) or "onnx".
        queries: Side of another grid of queries than the head was trained on; None: the same.
        store: Where to look the run up.
        runs: Folder of the runs, where it is not the store's own.

    Raises:
        InvalidInputError: There is no such format, or the head has no such grid of queries.
        NotFoundError: The run is not there, or a package that the format needs is missing.
        ExportError: The graph cannot be made, or it does not give the numbers of the run.
    """
    if form not in FORMATS:
        raise invalid("format", form, f"one of {', '.join(FORMATS)}")
    if form == "onnx":
        _check_onnx_packages()
    found = locate_run(run, store=store, runs=runs)
    model = load(found, device="cpu")
    if queries is not None:
        model.head.ask_on(queries)
    names = inputs_read(model)
    about = describe_export(model, found.record, names, queries=queries)
    written = write_graph(model, names, form=form, about=about)
    reader = onnx_graph if form == "onnx" else torch_graph
    difference = check_graph(reader(written), model, names)
    path = Path(out) if out is not None else Path(f"{found.run_id}{FORMATS[form]}")
    beside = path.with_name(f"{path.name}.json")
    write_bytes(path, written)
    write_bytes(beside, _text(about).encode())
    return ExportReport(
        run_id=found.run_id,
        path=str(path),
        metadata_path=str(beside),
        inputs=names,
        output_hw=model.head.output_hw,
        difference=difference,
        note=about["padding"] if found.record["plan"] and _is_padded(found.record) else "",
    )


class _Graph(nn.Module):
    """What is traced: final norm, head and `Task.predict`; every token counts."""

    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.head = model.head
        self._model, self._names = model, tuple(names)

    def forward(self, *arrays: Tensor) -> Tensor:
        """Give (batch, channels, Ho, Wo)."""
        tokens = self._model.tokens(dict(zip(self._names, arrays, strict=True)), ())
        return self._model.task.predict(self._model.head(tokens))


def inputs_read(model: Model) -> tuple[str, ...]:
    """List the arrays that decide the output: a head need not read prefix tokens."""
    with torch.enable_grad():
        arrays = [torch.from_numpy(array).requires_grad_() for array in _tokens(model, 1)]
        output = _Graph(model, model.array_names)(*arrays)
        slopes = torch.autograd.grad(output.sum(), arrays, allow_unused=True)
    return tuple(
        name
        for name, slope in zip(model.array_names, slopes, strict=True)
        if slope is not None or name in model.tap_names
    )


def write_graph(
    model: Model, names: Sequence[str], *, form: str, about: Mapping[str, Any]
) -> bytes:
    """Trace a model and give the bytes of the file, which hold `about` as well.

    Raises:
        ExportError: The head does what cannot be traced.
    """
    try:
        # The exporters warn of their own insides, which nobody here can change.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = _traced(model, names)
            return _onnx_bytes(program, names, about) if form == "onnx" else _pt2(program, about)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"The head must be traceable to be exported as {form}, and it is not: {reason} "
            "Rewrite what the reason names, or try another --format."
        ) from error


def _traced(model: Model, names: Sequence[str]) -> ExportedProgram:
    graph = _Graph(model, names).eval()
    arrays = tuple(torch.from_numpy(a) for a in _tokens(model, _TRACED_BATCH, names))
    batch = torch.export.Dim("batch", min=1)
    shapes = {"arrays": tuple({0: batch} for _ in arrays)}
    return torch.export.export(graph, arrays, dynamic_shapes=shapes, strict=False)


def _pt2(program: ExportedProgram, about: Mapping[str, Any]) -> bytes:
    sink = io.BytesIO()
    torch.export.save(program, sink, extra_files={"metadata.json": _text(about)})
    return sink.getvalue()


def _onnx_bytes(program: ExportedProgram, names: Sequence[str], about: Mapping[str, Any]) -> bytes:
    made = torch.onnx.export(
        program, input_names=list(names), output_names=[OUTPUT], dynamo=True, verbose=False
    )
    assert made is not None
    proto = made.model_proto
    proto.metadata_props.add(key="featstore", value=_text(about))
    written: bytes = proto.SerializeToString()
    return written


def torch_graph(written: bytes) -> Graph:
    """Open the bytes of a `torch.export` program."""
    module = torch.export.load(io.BytesIO(written)).module()

    def run(arrays: Sequence[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(*map(torch.from_numpy, arrays)))

    return run


def onnx_graph(written: bytes) -> Graph:
    """Open the bytes of an ONNX file in onnxruntime, on the processor."""
    import onnxruntime

    session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(session.run([OUTPUT], dict(zip(names, arrays, strict=True)))[0])

    return run


def check_graph(graph: Graph, model: Model, names: Sequence[str]) -> float:
    """Compare a graph with its model on random tokens and give the largest difference.

    Raises:
        ExportError: A number is off by more than the tolerance.
    """
    largest = 0.0
    for batch in _CHECKED_BATCHES:
        arrays = _tokens(model, batch, names)
        expected = model.predict(dict(zip(names, arrays, strict=True)))
        given = graph(arrays)
        if given.shape != expected.shape:
            raise ExportError(
                f"The graph must give the shape {expected.shape} of the run. Got {given.shape}. "
                "Please report it; nothing was written."
            )
        off = np.abs(given - expected)
        if not (off <= ATOL + RTOL * np.abs(expected)).all():  # also false for NaN
            raise ExportError(
                f"The graph must agree with the run within {ATOL:g} + {RTOL:g} of each number. "
                f"Got a difference of {float(off.max()):.3g} for a batch of {batch}. "
                "Try another --format; nothing was written."
            )
        largest = max(largest, float(off.max()))
    return largest


def describe_export(
    model: Model, record: Mapping[str, Any], names: Sequence[str], *, queries: int | None = None
) -> dict[str, Any]:
    """Tell all that is needed to use the graph elsewhere, as JSON values.

    Args:
        model: Head and task, asked on the grid that the graph has.
        record: Of the run.
        names: Inputs of the graph.
        queries: Side of the grid where it is not the one that the head was trained on.
    """
    plan = record["plan"]
    task = model.task
    return {
        "format": METADATA,
        "run": record.get("run_id"),
        "head": record["head"],
        "head_options": record["options"]["head"],
        "asked_queries": queries,
        "task": record["task"],
        "task_options": record["options"]["task"],
        "class_names": list(getattr(task, "class_names", ())) or None,
        "backbone": record["backbone"],
        "weights_sha256": record["weights_sha256"],
        "image": None if plan is None else _image(plan),
        "inputs": [_input(model, name, record) for name in names],
        "output": {
            "name": OUTPUT,
            "shape": ["batch", task.n_outputs, *model.head.output_hw],
            "dtype": "float32",
            "meaning": task.meaning or None,
            "unit": task.unit,
            "frame": "covers the whole input of the backbone, its padding included; the centre "
            "of row r of R lies at (r + 0.5) / R of its height, columns likewise",
        },
        "padding": "every token counts; a run leaves out tokens of padding, which the graph "
        "does not know of"
        if plan is not None and _is_padded(record)
        else None,
        "tolerance": {"relative": RTOL, "absolute": ATOL},
    }


def _is_padded(record: Mapping[str, Any]) -> bool:
    return parse_resize(record["plan"]["resize"]).kind in _PADS


def _image(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Tell how an image becomes the backbone's input."""
    return {
        "size_hw": plan["image_size"],
        "resize": plan["resize"],
        "interpolation": plan["interpolation"],
        "channels": "RGB in [0, 1], less the mean, divided by the deviation",
        "mean": plan["mean"],
        "std": plan["std"],
    }


def _input(model: Model, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    tap, _, kind = name.partition("/")
    shape = next(each for each in model.taps if each.tap == tap)
    assert shape.grid is not None
    is_patch = not kind
    return {
        "name": name,
        "tap": tap,
        "tokens": "row by row over the grid" if is_patch else "class token, then registers",
        "shape": ["batch", *shape.arrays["patch" if is_patch else "prefix"]],
        "dtype": "float32",
        "grid": list(shape.grid) if is_patch else None,
        "final_norm": "in the graph" if tap in record["normed_taps"] else "not applied",
    }


def _tokens(model: Model, batch: int, names: Sequence[str] | None = None) -> list[np.ndarray]:
    """Draw normal tokens, equal for equal calls, in the order of `names`.

    Images differ in scale by factors of ten: where a task clamps, not all of them are clamped.
    """
    random = np.random.default_rng(batch)
    scale = 10.0 ** (np.arange(batch, dtype=np.float32) - batch // 2)
    drawn = {}
    for shape in model.taps:
        for kind, size in shape.arrays.items():
            name = shape.tap if kind == "patch" else f"{shape.tap}/{kind}"
            normal = random.standard_normal((batch, *size), dtype=np.float32)
            drawn[name] = normal * scale[:, None, None]
    return [drawn[name] for name in (model.array_names if names is None else names)]


def _check_onnx_packages() -> None:
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise NotFoundError(
            f"The format onnx needs {', '.join(missing)}, which is not installed here. "
            "Run `pip install 'featstore-heads[export]'`, or use --format torch."
        )


def _text(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=2) + "\n"

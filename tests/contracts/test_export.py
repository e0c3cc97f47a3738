"""What every head and every task meets by being registered: it can be exported."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from featstore.vit_sizes import VitSize
from heads.build import HEADS, build_head
from heads.describe import taps_on
from heads.export import (
    ONNX_PACKAGES,
    check_graph,
    inputs_read,
    onnx_graph,
    torch_graph,
    write_graph,
)
from heads.model import Model, NormTensors
from heads.options import option_defaults
from heads.tasks import TASKS, build_task

GRID = (3, 4)
OPTIONS = {
    "segmentation.v1": {"classes": 3},
    "classification.v1": {"names": "a|b|c"},
    "pose.v1": {"names": "a|b|c", "scales": True},
}
MISSING = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]


def make(head: str, task_name: str, **options: object) -> Model:
    torch.manual_seed(0)
    task = build_task(task_name, OPTIONS.get(task_name))
    kind = HEADS[head]
    size = VitSize(width=16, depth=5, n_heads=2, n_prefix=1, hidden=32)
    chosen = option_defaults(kind.OPTIONS) | options
    taps, tail = taps_on(kind, size, grid=GRID, named=["block:3"], options=chosen)
    built = build_head(head, taps=taps, n_outputs=task.readouts, options=chosen, tail=tail)
    norm = NormTensors(kind="layer_norm", eps=1e-6, weight=torch.rand(16), bias=torch.rand(16))
    return Model(head=built.eval(), task=task, taps=taps, norm=norm)


def difference(model: Model, *, form: str = "torch") -> float:
    names = inputs_read(model)
    written = write_graph(model, names, form=form, about={})
    graph = onnx_graph(written) if form == "onnx" else torch_graph(written)
    random = np.random.default_rng(0)
    sizes = {name: (1, 1 if name.endswith("/prefix") else 12, 16) for name in names}
    expected = model.predict({n: random.standard_normal(s, np.float32) for n, s in sizes.items()})
    assert np.ptp(expected) > 0  # a constant would agree with everything
    return check_graph(graph, model, names)


@pytest.mark.parametrize("head", list(HEADS))
def test_a_torch_graph_of_every_head_gives_the_numbers_of_the_run(head):
    assert difference(make(head, "instances.v1")) < 1e-5


@pytest.mark.parametrize("task", list(TASKS))
def test_a_torch_graph_of_every_task_gives_the_numbers_of_the_run(task):
    model = make("linear.v1", task)
    with torch.no_grad():  # into the range where no task clamps
        for bias in model.head.output_biases():
            bias.fill_(0.5)
    assert difference(model) < 1e-5


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
@pytest.mark.parametrize("head", ["deap.v1", "maxa.v1", "linear.v1", "vit_split_prior.v1"])
def test_an_onnx_graph_gives_the_numbers_of_the_run(head):
    assert difference(make(head, "segmentation.v1"), form="onnx") < 1e-4

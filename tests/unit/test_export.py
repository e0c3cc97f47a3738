"""`heads export`: the file, what lies beside it, and what stops it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch

from cli.common import exit_code
from cli.heads_app import heads
from featstore.errors import ExportError, InvalidInputError, NotFoundError
from featstore.types import TapShape
from heads import blocks
from heads.blocks import masked_attention, plain_masked_attention
from heads.build import build_head
from heads.export import check_graph, export, inputs_read
from heads.model import Model, NormTensors, load, save_model, shape_to_json
from heads.runs import write_record
from heads.tasks import build_task

MODULE = import_module("heads.export")  # `heads.export` itself is the function
RUN_ID = "linear-segmentation-20260101-120000-0a1b"
PLAN = {
    "image_size": [48, 64],
    "resize": "squash",
    "interpolation": "bicubic",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
}


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def make_run(runs, *, head="linear.v1", options=None, plan=PLAN, n_prefix=1):
    """Write a run with random weights and give its folder."""
    torch.manual_seed(0)
    tap = TapShape(tap="block:3", dim=8, grid=(3, 4), n_prefix=n_prefix)
    task_options = {"classes": 2, "names": "sky|road"}
    task = build_task("segmentation", task_options)
    built = build_head(head, taps=[tap], n_outputs=task.readouts, options=options or {})
    norm = NormTensors(kind="rms_norm", eps=1e-6, weight=torch.rand(8) + 1, bias=None)
    path = runs / RUN_ID
    path.mkdir(parents=True)
    save_model(path, built.state_dict(), norm)
    write_record(
        path,
        {
            "status": "done",
            "run_id": RUN_ID,
            "head": head,
            "task": "segmentation.v1",
            "options": {"head": options or {}, "task": task_options},
            "plan": plan,
            "backbone": {"name": "net"},
            "weights_sha256": "ab" * 32,
            "tap_shapes": [shape_to_json(tap)],
            "normed_taps": ["block:3"],
        },
    )
    return path


def test_the_file_loads_and_runs_where_this_project_cannot_be_imported(runs, tmp_path):
    folder = make_run(runs)
    report = export(folder, tmp_path / "head.pt2")
    tokens = np.random.default_rng(0).standard_normal((5, 12, 8), dtype=np.float32)
    np.save(tmp_path / "tokens.npy", tokens)
    code = (
        "import sys; sys.modules['heads'] = sys.modules['featstore'] = None\n"
        "import numpy as np, torch\n"
        "graph = torch.export.load('head.pt2').module()\n"
        "np.save('given.npy', graph(torch.from_numpy(np.load('tokens.npy'))).detach())\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    expected = load(folder).predict({"block:3": tokens})
    np.testing.assert_allclose(np.load(tmp_path / "given.npy"), expected, rtol=1e-5, atol=1e-5)
    assert report.difference < 1e-5


def test_what_lies_beside_the_file_tells_how_to_use_it_and_is_inside_too(runs, tmp_path):
    export(make_run(runs), tmp_path / "head.pt2")
    text = (tmp_path / "head.pt2.json").read_text()
    about = json.loads(text)
    assert about["class_names"] == ["sky", "road"]
    assert about["image"]["size_hw"] == [48, 64]
    assert about["image"]["mean"] == [0.5, 0.4, 0.3]
    assert about["output"]["shape"] == ["batch", 2, 224, 224]
    assert about["output"]["meaning"] == "log-probability of each class"
    (tokens,) = about["inputs"]
    assert (tokens["name"], tokens["shape"]) == ("block:3", ["batch", 12, 8])
    assert tokens["final_norm"] == "in the graph"
    inside = {"metadata.json": ""}
    torch.export.load(tmp_path / "head.pt2", extra_files=inside)
    assert inside["metadata.json"] == text


@pytest.mark.parametrize("head", ["deap.v1", "maxa.v1"])
def test_a_graph_may_answer_on_another_grid_of_queries(runs, tmp_path, head):
    folder = make_run(runs, head=head, options={"queries": 3})
    report = export(folder, tmp_path / "head.pt2", queries=5)
    assert report.output_hw == (40, 40)
    about = json.loads((tmp_path / "head.pt2.json").read_text())
    assert about["output"]["shape"] == ["batch", 2, 40, 40]
    assert (about["asked_queries"], about["head_options"]["queries"]) == (5, 3)
    model = load(folder)
    model.head.ask_on(5)
    tokens = np.random.default_rng(0).standard_normal((2, 12, 8), dtype=np.float32)
    with torch.inference_mode():
        given = torch.export.load(tmp_path / "head.pt2").module()(torch.from_numpy(tokens))
    expected = model.predict({"block:3": tokens})
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def test_a_head_without_queries_cannot_be_asked_on_others(runs, tmp_path):
    with pytest.raises(InvalidInputError, match="Linear has no grid of queries"):
        export(make_run(runs), tmp_path / "head.pt2", queries=5)
    assert not (tmp_path / "head.pt2").exists()
    words = ["export", RUN_ID, "--runs", str(runs), "--queries", "5"]
    assert exit_code(heads, [*words, "--out", str(tmp_path / "a.pt2")]) == 1


def test_prefix_tokens_are_an_input_only_where_the_head_reads_them(runs, tmp_path):
    folder = make_run(runs, options={"cls": True})
    report = export(folder, tmp_path / "head.pt2")
    assert report.inputs == ("block:3", "block:3/prefix")
    assert inputs_read(load(make_run(tmp_path / "other"))) == ("block:3",)


@pytest.mark.parametrize(
    ("resize", "is_noted"),
    [("letterbox", True), ("letterbox+via:64", True), ("squash", False), ("via:64", False)],
)
def test_that_padding_is_read_is_said_where_there_may_be_some(runs, tmp_path, resize, is_noted):
    folder = make_run(runs, plan={**PLAN, "resize": resize})
    assert bool(export(folder, tmp_path / "head.pt2").note) is is_noted


def test_a_run_of_imported_features_is_exported_without_an_image(runs, tmp_path):
    export(make_run(runs, plan=None), tmp_path / "head.pt2")
    assert json.loads((tmp_path / "head.pt2.json").read_text())["image"] is None


def test_a_graph_that_gives_other_numbers_leaves_no_file(runs, tmp_path, monkeypatch):
    folder, out = make_run(runs), tmp_path / "out"
    predict = Model.predict
    monkeypatch.setattr(Model, "predict", lambda *given: predict(*given) + 0.01)
    with pytest.raises(ExportError, match=r"difference of 0\.01 for a batch of 1"):
        export(folder, out / "head.pt2")
    assert not out.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_fails_the_check(runs, value):
    model = load(make_run(runs))
    with pytest.raises(ExportError, match="must agree"):
        check_graph(
            lambda arrays: np.full((len(arrays[0]), 2, 224, 224), value), model, ["block:3"]
        )


def test_a_head_that_cannot_be_traced_says_so_in_one_sentence(runs, tmp_path, monkeypatch):
    def forward(self, inputs):
        return torch.zeros(int(inputs[0].patch.sum()), 2, 224, 224)

    folder = make_run(runs)
    monkeypatch.setattr(MODULE, "inputs_read", lambda model: ("block:3",))
    monkeypatch.setattr("heads.linear.Linear.forward", forward)
    with pytest.raises(ExportError, match="must be traceable") as caught:
        export(folder, tmp_path / "head.pt2")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_what_installs_it(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "find_spec", lambda name: None)
    with pytest.raises(
        NotFoundError, match=r"needs onnx, .* `pip install 'featstore-heads\[export"
    ):
        export(make_run(runs), tmp_path / "head.onnx", form="onnx")


def test_an_unknown_format_is_refused(runs, tmp_path):
    with pytest.raises(InvalidInputError, match="torch, onnx"):
        export(make_run(runs), tmp_path / "head.x", form="x")


def test_the_command_prints_one_json_object(runs, tmp_path, monkeypatch, capsys):
    make_run(runs)
    monkeypatch.chdir(tmp_path)
    assert exit_code(heads, ["export", "@last", "--runs", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == f"{RUN_ID}.pt2"
    assert (tmp_path / f"{RUN_ID}.pt2.json").is_file()


def test_the_onnx_command_prints_one_json_object_and_names_its_inputs(runs, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is missing")
    pytest.importorskip("onnxscript", reason="the extra `export` is missing")
    make_run(runs)
    out = tmp_path / "head.onnx"
    args = ["export", "@last", "--runs", str(runs), "--format", "onnx", "--out", str(out)]
    assert exit_code(heads, [*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == ["block:3"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "block:3"
    inside = session.get_modelmeta().custom_metadata_map["featstore"]
    assert inside == out.with_name("head.onnx.json").read_text()


@pytest.mark.parametrize("has_bias", [False, True])
def test_plain_attention_gives_what_the_fast_one_gives_with_its_slopes(has_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3), (4, 2, 3, 7), (4, 2, 6, 7), (2, 5, 7))
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    bias = torch.zeros(4, 7, dtype=torch.float64)
    bias[1, :3] = -torch.inf
    given = [*tensors, bias if has_bias else None]
    plain, fast = plain_masked_attention(*given), masked_attention(*given)
    torch.testing.assert_close(plain, fast)
    weights = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((plain * weights).sum(), tensors),
        torch.autograd.grad((fast * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_tracing_leaves_no_traced_tensor_in_the_cache_of_enlarging_weights():
    blocks._cached_weights.cache_clear()
    upscale = blocks.Upscale(2)
    image = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.export.export(upscale, (image,), strict=False)
    expected = torch.nn.functional.interpolate(image, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(upscale(image), expected)

"""Views with a real backbone, from the command line to flip-averaging."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner

import heads
from cli.featstore_app import featstore
from cli.heads_app import heads as heads_app
from featstore.api import open as open_store
from featstore.backbones import load_backbone
from featstore.datasets import open_dataset
from featstore.errors import NotFoundError
from featstore.images import decode, draw
from tests.tiny_backbones import tiny_backbone

DATA = "rooms:n=6,seed=0,size=48x64"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    tiny_backbone(folder, "plain")
    return f"local-dir:{folder}/plain"


def run(app, *words):
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_views_from_the_command_line_to_flip_averaging(tmp_path, backbone):
    path = tmp_path / "s.zarr"
    base = ["extract", "--store", path, "--backbone", backbone, "--data", DATA, "--taps", "norm"]
    base += ["--image-size", "32x48"]
    run(featstore, *base)
    report = run(featstore, *base, "--views", "crops:2,seed=5")
    assert (report["rows"], report["new_rows"], report["reused_rows"]) == (18, 12, 6)
    words = ["train", "--store", path, "--task", "depth", "--steps", 2, "--batch-size", 2]
    words += ["--set", "queries=4", "--set", "pictures=0", "--device", "cpu"]
    trained = run(heads_app, *words, "--set", "views=one")
    with pytest.raises(NotFoundError, match="no stored view hflip") as raised:
        heads.evaluate(trained["path"], tta="hflip", device="cpu")
    named = shlex.split(str(raised.value).split("`")[1])
    report = run(featstore, *named[1:])
    assert (report["rows"], report["new_rows"], report["reused_rows"]) == (12, 6, 6)
    measure = ["evaluate", trained["run_id"], "--store", path, "--device", "cpu"]
    plain, tta = run(heads_app, *measure), run(heads_app, *measure, "--tta", "hflip")
    assert (plain["tta"], tta["tta"]) == (None, "hflip")
    assert plain["metrics"] != tta["metrics"]
    assert (
        "averaged over hflip"
        in CliRunner().invoke(heads_app, map(str, [*measure, "--tta", "hflip"])).stdout
    )
    _check_rows(path, backbone)


def _check_rows(path, backbone):
    """Every row holds what the backbone gives for the region that its assignment names."""
    features = open_store(path).feature_set()
    model = load_backbone(backbone, image_size=(32, 48), device="cpu", taps=["norm"])
    reader = open_dataset(DATA)
    items = {item.path: item for item in reader.items()}
    lines = features.folder.assignments().to_pylist()
    assert {line["view"] for line in lines} == {"plain", "hflip", "crop:5:0", "crop:5:1"}
    plain = {line["image_key"]: line["row"] for line in lines if line["view"] == "plain"}
    for line in lines[::5]:
        pixels = decode(reader.read_image(items[line["path"]]))
        x0, y0, x1, y1 = (int(line[f"box_{name}"]) for name in ("x0", "y0", "x1", "y1"))
        part = np.ascontiguousarray(pixels[y0:y1, x0:x1])
        if line["view"] == "hflip":
            part = np.ascontiguousarray(part[:, ::-1])
        whole = features.placements([line["row"]])[line["row"]].__class__(
            source_hw=part.shape[:2],
            input_hw=(32, 48),
            box=(0.0, 0.0, float(part.shape[1]), float(part.shape[0])),
            dst=(0, 0, 48, 32),
        )
        drawn = draw(part, whole, interpolation=features.plan.interpolation, fill_rgb=(0, 0, 0))
        expected = model.forward(drawn[None])["norm"][0].float().numpy()
        found = features.read("norm", rows=[line["row"]])[0].astype(np.float32)
        # Drawn from the whole image, the border of a region is mixed with what lies beside it.
        np.testing.assert_allclose(found, expected, atol=0.15)
        if line["view"] != "plain":
            other = features.read("norm", rows=[plain[line["image_key"]]])[0]
            assert np.abs(found - other).max() > 0.3

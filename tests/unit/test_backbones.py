"""Loading backbones: what is refused, what is chosen, where weights come from."""

from __future__ import annotations

import json
import shutil
import socket
import threading

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from featstore.backbones import hub, load_backbone, load_from_identity, padded_size
from featstore.backbones.lite0 import lite0_name
from featstore.backbones.loading import read_name
from featstore.errors import FormatError, InvalidInputError, NotFoundError

VIT = "test_vit"  # timm's smallest: 6 blocks of 64 channels, native 160 px, patch 16
CLIP = "vit_xsmall_patch16_clip_224"


def load(name, **options):
    return load_backbone(name, **{"device": "cpu", "taps": [f"{unit_of(name)}:0"], **options})


def unit_of(name):
    return "stage" if "conv" in name or "dla" in name else "block"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Write whole weights of the smallest ViT, with its classifier."""
    path = tmp_path_factory.mktemp("weights") / "whole.safetensors"
    save_file(timm.create_model(VIT).state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path, whole):
    """Write what `local-dir:` names: a configuration and weights."""
    pages = tmp_path / "page"
    pages.mkdir()
    config = timm.create_model(VIT).pretrained_cfg
    kept = {key: config[key] for key in ("input_size", "fixed_input_size", "std", "classifier")}
    kept["mean"] = [0.1, 0.2, 0.3]
    (pages / "config.json").write_text(
        json.dumps({"architecture": VIT, "num_classes": 1000, "pretrained_cfg": kept})
    )
    shutil.copy(whole, pages / "model.safetensors")
    return pages


class TestFiles:
    """A file fills every tensor of the backbone and has no other, or is refused."""

    def test_patches_of_another_size_are_refused(self, tmp_path):
        path = tmp_path / "patch32.safetensors"
        save_file(timm.create_model("vit_small_patch32_224").state_dict(), path)
        with pytest.raises(InvalidInputError, match=r"patch_embed\.proj.*32, 32.*16, 16"):
            load("vit_small_patch16_224", weights=path)

    def test_a_family_that_timm_loads_leniently_is_loaded_strictly(self, tmp_path):
        state = timm.create_model("dla46_c").state_dict()
        state = {key: value.contiguous() for key, value in state.items()}
        del state["level2.tree1.conv2.weight"]
        path = tmp_path / "part.safetensors"
        save_file(state, path)
        with pytest.raises(InvalidInputError, match=r"it lacks level2\.tree1\.conv2\.weight"):
            load("dla46_c", weights=path)

    def test_a_tensor_too_many_is_refused(self, whole, tmp_path):
        path = tmp_path / "more.safetensors"
        save_file({**load_file(whole), "blocks.6.norm1.bias": torch.zeros(64)}, path)
        with pytest.raises(InvalidInputError, match=r"it has blocks\.6\.norm1\.bias"):
            load(VIT, weights=path)

    def test_a_strict_load_leaves_torch_as_it_was(self, whole, tmp_path):
        original = torch.nn.Module.load_state_dict
        load(VIT, weights=whole)
        save_file({"blocks.0.norm1.bias": torch.zeros(64)}, tmp_path / "one.safetensors")
        with pytest.raises(InvalidInputError, match="it lacks"):
            load(VIT, weights=tmp_path / "one.safetensors")
        assert torch.nn.Module.load_state_dict is original

    @pytest.mark.parametrize("is_zip", [True, False])
    def test_checkpoints_of_torch_save_old_and_new_load_alike(self, whole, tmp_path, is_zip):
        path = tmp_path / "checkpoint.pth"
        nested = {"epoch": 3, "model": load_file(whole)}
        torch.save(nested, path, _use_new_zipfile_serialization=is_zip)
        expected = load(VIT, weights=whole).weights_sha256
        assert load(VIT, weights=path).weights_sha256 == expected

    def test_a_classifier_of_any_size_is_left_out(self, whole, tmp_path):
        state = load_file(whole)
        state["head.weight"], state["head.bias"] = torch.zeros(7, 64), torch.zeros(7)
        save_file(state, tmp_path / "tuned.safetensors")
        tuned = load(VIT, weights=tmp_path / "tuned.safetensors")
        assert tuned.weights_sha256 == load(VIT, weights=whole).weights_sha256

    def test_the_image_tower_is_taken_out_of_an_open_clip_file(self, tmp_path):
        plain = tmp_path / "plain.safetensors"
        save_file(timm.create_model(CLIP, num_classes=0).state_dict(), plain)
        path = tmp_path / "open_clip_model.safetensors"
        save_file(as_open_clip(load_file(plain)), path)
        expected = load(CLIP, weights=plain).weights_sha256
        assert load(CLIP, weights=path).weights_sha256 == expected

    @pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut"])
    @pytest.mark.parametrize("ending", ["safetensors", "pth"])
    def test_a_file_of_something_else_is_refused(self, tmp_path, content, ending):
        path = tmp_path / f"junk.{ending}"
        path.write_bytes(content)
        with pytest.raises(InvalidInputError, match="is no weights file, or is damaged"):
            load(VIT, weights=path)

    def test_a_checkpoint_without_tensors_is_refused(self, tmp_path):
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(InvalidInputError, match="holds no named tensors"):
            load(VIT, weights=tmp_path / "list.pth")


def as_open_clip(state):
    """Rename timm's tensors as open_clip does, and add a text tower and the projection."""
    renames = [
        ("patch_embed.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
        ("norm_pre", "ln_pre"),
        ("blocks.", "transformer.resblocks."),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    renamed = {}
    for key, value in state.items():
        key = "ln_post" + key[4:] if key.startswith("norm.") else key
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        squeezed = value.squeeze(0) if key == "positional_embedding" else value
        renamed[f"visual.{key}"] = value.flatten() if key == "class_embedding" else squeezed
    text = {"logit_scale": torch.ones(1), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return {**renamed, **text, "visual.proj": torch.zeros(state["norm.weight"].shape[0], 32)}


class TestRandom:
    """Random weights are a fair baseline."""

    @pytest.mark.parametrize(
        "name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "convnext_atto"]
    )
    def test_layer_scale_is_one(self, name):
        model = load(name, weights="random", image_size=(112, 112)[:2] if "14" in name else None)
        scales = {
            key: value for key, value in model.model.named_parameters() if ".gamma" in f".{key}"
        }
        assert scales
        assert all((value == 1).all() for value in scales.values())

    def test_the_callers_random_numbers_go_on(self):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        load(VIT, weights="random:5")
        torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("seed", ["x", "-1", "1.5", "²", str(2**70)])
    def test_a_seed_is_a_whole_number(self, seed):
        with pytest.raises(InvalidInputError, match="random:SEED"):
            load(VIT, weights=f"random:{seed}")


class TestSizes:
    """An image size is chosen where none is given, and checked where one is."""

    @pytest.mark.parametrize(
        ("name", "side"),
        [
            ("dinov2_s", 224),
            ("siglip_b_384", 384),
            (VIT, 224),
            ("levit_128s", 224),  # no multiple of its last stride
            ("halonet_h1", 256),  # refuses 224
            ("crossvit_tiny_240", 240),  # refuses 224
        ],
    )
    def test_the_default_is_about_224_or_the_native_size(self, name, side):
        assert read_name(name).input_hw(None) == (side, side)

    def test_a_size_that_a_model_refuses_is_a_clear_error(self):
        with pytest.raises(InvalidInputError, match=r"224x224.*own size is 256x256"):
            load("halonet_h1", weights="random", image_size=(224, 224), taps=["stage:-1"])

    def test_the_native_size_is_always_right(self):
        assert read_name("crossvit_tiny_240").stride == 17
        assert read_name("crossvit_tiny_240").input_hw((240, 240)) == (240, 240)

    def test_the_nearest_multiples_are_named(self):
        with pytest.raises(InvalidInputError, match="Near 5: 16;"):
            load(VIT, weights="random", image_size=(5, 64))

    @pytest.mark.parametrize("name", ["dinov2_s", "vit_small_patch14_dinov2"])
    def test_padding_rounds_up_to_whole_patches(self, name):
        assert padded_size(name, (512, 14)) == (518, 14)


class TestPrefix:
    """CLS and registers are told apart."""

    @pytest.mark.parametrize(
        ("name", "order"),
        [
            ("vit_small_patch14_reg4_dinov2", ["cls", *["register"] * 4]),
            ("vit_medium_patch16_reg4_gap_256", ["register"] * 4),
            ("deit_tiny_distilled_patch16_224", ["cls", "distillation"]),
            ("cait_xxs24_224", []),  # its CLS token comes in after the blocks
        ],
    )
    def test_the_order_is_recorded(self, name, order):
        side = 56 if "14" in name else 64
        model = load(name, weights="random", image_size=(side, side))
        assert model.identity()["prefix_order"] == order
        assert model.tap_shapes["block:0"].n_prefix == len(order)

    def test_a_register_is_not_given_out_as_cls(self):
        with pytest.raises(InvalidInputError, match="no CLS token"):
            load(
                "vit_medium_patch16_reg4_gap_256",
                weights="random",
                image_size=(64, 64),
                taps=["norm.cls"],
            )


class TestFolders:
    """`local-dir:` names a folder with a configuration and weights."""

    def test_it_decides_the_numbers_and_its_place_does_not(self, folder, tmp_path, whole):
        moved = tmp_path / "elsewhere"
        shutil.copytree(folder, moved)
        one, other = load(f"local-dir:{folder}"), load(f"local-dir:{moved}")
        assert one.mean == (0.1, 0.2, 0.3)
        assert one.weights_sha256 == load(VIT, weights=whole).weights_sha256
        identities = [dict(backbone.identity()) for backbone in (one, other)]
        for identity in identities:
            identity.pop("name")
        assert identities[0] == identities[1]

    def test_it_takes_other_weights(self, folder, whole):
        assert load(f"local-dir:{folder}", weights="random:2").tag == "random:2"
        assert load(f"local-dir:{folder}", weights=whole).tag == "file"

    def test_a_size_off_the_patch_is_refused(self, folder):
        with pytest.raises(InvalidInputError, match="multiple of 16"):
            load(f"local-dir:{folder}", image_size=(65, 64))

    def test_part_of_the_weights_is_refused(self, folder):
        path = folder / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if "blocks.3." not in k}, path)
        with pytest.raises(InvalidInputError, match=r"it lacks blocks\.3\.norm1\.weight.* more"):
            load(f"local-dir:{folder}")

    @pytest.mark.parametrize("text", ["{nope", "[]", "{}", '{"architecture": "no_such_net"}'])
    def test_a_configuration_of_something_else_is_refused(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(InvalidInputError, match=r"config\.json"):
            load(f"local-dir:{folder}")

    def test_missing_weights_are_named(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(NotFoundError, match=r"model\.safetensors"):
            load(f"local-dir:{folder}")


class TestHub:
    """Cached weights need no network; others fail within seconds without one."""

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch, whole):
        from huggingface_hub import constants

        page = tmp_path / "models--timm--test_vit.r160_in1k"
        snapshot = page / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (page / "refs").mkdir()
        (page / "refs" / "main").write_text("a" * 40)
        shutil.copy(whole, snapshot / "model.safetensors")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        return tmp_path

    def test_cached_weights_are_taken_without_asking(self, cache, monkeypatch, whole):
        def ask(endpoint):
            raise AssertionError("asked the hub")

        monkeypatch.setattr(hub, "_answers", ask)
        found = load("test_vit.r160_in1k")
        assert found.weights_sha256 == load(VIT, weights=whole).weights_sha256
        assert (found.tag, found.weights_source) == (
            "r160_in1k",
            "hf-hub:timm/test_vit.r160_in1k",
        )

    def test_weights_that_are_nowhere_name_the_cache_and_the_ways_out(self, cache, monkeypatch):
        monkeypatch.setattr(hub, "_answers", lambda endpoint: False)
        with pytest.raises(NotFoundError, match=r"--weights FILE.*efficientnet_lite0") as caught:
            load("dinov2_s")
        assert str(cache) in str(caught.value)

    @pytest.mark.parametrize("reply", [b"HTTP/1.0 404 Not Found\r\n\r\n", None])
    def test_any_answer_counts_and_silence_does_not(self, monkeypatch, reply):
        monkeypatch.setattr(hub, "CONNECT_S", 5.0 if reply else 0.2)
        monkeypatch.setenv("no_proxy", "*")
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=answer, args=(server, reply), daemon=True).start()
            port = server.getsockname()[1]
            assert hub._answers(f"http://127.0.0.1:{port}") == (reply is not None)

    def test_a_refused_connection_is_no_answer(self, monkeypatch):
        monkeypatch.setenv("no_proxy", "*")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        assert not hub._answers(f"http://127.0.0.1:{port}")

    @pytest.mark.parametrize("page", ["", "a b c", "one/two/three"])
    def test_what_is_no_page_is_refused(self, page):
        with pytest.raises(InvalidInputError, match="hf-hub:ORG/REPOSITORY"):
            load(f"hf-hub:{page}")

    def test_safer_formats_come_first(self):
        assert hub.weight_names("") == ("model.safetensors", "pytorch_model.bin")
        assert hub.weight_names("open_clip_pytorch_model.bin")[0] == "open_clip_model.safetensors"
        assert hub.weight_names("net.bin") == ("net.safetensors", "net.bin")
        assert hub.weight_names("net.safetensors") == ("net.safetensors",)


def answer(server, reply):
    connection, _ = server.accept()
    with connection:
        connection.recv(1000)
        if reply:
            connection.sendall(reply)
        else:
            connection.recv(1000)  # says nothing until the other side gives up


class TestIdentity:
    """A feature set's backbone comes back as it was, or not at all."""

    def test_a_file_is_asked_for_by_name(self, whole):
        identity = load(VIT, weights=whole).identity()
        with pytest.raises(InvalidInputError, match=r"came from a weights file.*--weights FILE"):
            load_from_identity(identity, device="cpu")
        assert load_from_identity(identity, weights=whole, device="cpu").tag == "file"

    def test_other_weights_are_refused_by_both_hashes(self, whole):
        one, other = load(VIT, weights=whole), load(VIT, weights="random:9")
        with pytest.raises(InvalidInputError, match="--weights FILE") as caught:
            load_from_identity(one.identity(), weights="random:9", device="cpu")
        for backbone in (one, other):
            assert backbone.weights_sha256[:12] in str(caught.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("mean", [0, 0, 0]), ("interpolation", "nearest"), ("position_grid", "other")],
    )
    def test_another_preparation_of_images_is_refused(self, field, value):
        identity = {**load(VIT, weights="random:1").identity(), field: value}
        with pytest.raises(InvalidInputError, match=f"has {field}"):
            load_from_identity(identity, device="cpu")

    def test_the_tag_of_a_default_is_pinned(self, monkeypatch):
        identity = {**load(VIT, weights="random:1").identity(), "tag": "r160_in1k"}
        with pytest.raises(NotFoundError, match=r"test_vit\.r160_in1k"):
            load_from_identity(identity, device="cpu")


class TestFacts:
    """Facts that no dry run shows."""

    def test_clip_computes_the_quick_gelu_it_was_trained_with(self):
        for name in ("clip_b", "clip_l", "metaclip_b"):
            assert "quickgelu" in read_name(name).architecture

    def test_bioclip_is_normalised_as_its_authors_do(self):
        blueprint = read_name("bioclip2")
        assert blueprint.config.mean == (0.48145466, 0.4578275, 0.40821073)
        assert blueprint.config.std == (0.26862954, 0.26130258, 0.27577711)
        assert (blueprint.page, blueprint.licence) == ("imageomics/bioclip-2", "mit")
        assert blueprint.tag == "imageomics/bioclip-2"

    def test_a_tensor_name_that_lite0_does_not_have_is_refused(self):
        assert lite0_name("_blocks.0._bn2.bias") == "blocks.0.0.bn2.bias"
        assert lite0_name("_blocks.15._project_conv.weight") == "blocks.6.0.conv_pwl.weight"
        for wrong in ("_swish", "_blocks.16._bn0.bias", "_blocks.0._expand_conv.weight"):
            with pytest.raises(FormatError, match="no tensor named"):
                lite0_name(wrong)

    @pytest.mark.parametrize(
        ("name", "side", "rule"),
        [
            (VIT, 160, "native"),
            (VIT, 64, "timm bicubic antialias"),
            ("vit_small_patch16_dinov3", 64, "rope"),
            ("eva02_tiny_patch14_224", 56, "rope, timm bicubic antialias"),
            ("sam2_hiera_tiny", 224, "timm bicubic"),
            ("convnext_atto", 64, "none"),
        ],
    )
    def test_the_rule_for_positions_is_recorded(self, name, side, rule):
        taps = ["stage:0"] if name.startswith(("sam2", "conv")) else ["block:0"]
        model = load(name, weights="random", image_size=(side, side), taps=taps)
        assert model.position_grid == rule

    def test_operations_are_counted(self):
        model = load(VIT, weights="random", taps=["norm"])
        weights = sum(one.numel() for one in model.model.parameters() if one.ndim == 2)
        tokens = 1 + 14 * 14
        assert model.flops_per_image > 2 * weights * tokens
        assert model.flops_per_image < 4 * weights * tokens

    def test_tf32_is_off(self):
        torch.backends.cuda.matmul.allow_tf32 = True
        load(VIT, weights="random")
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32


@pytest.fixture(scope="module")
def saliency(shared):
    path = shared / "weights" / "vits14_saliency.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    return path


def test_a_real_file_gives_the_bits_of_a_direct_timm_forward(saliency):
    taps = ["block:3", "block:11", "norm"]
    backbone = load("dinov2_s", weights=saliency, image_size=(112, 98), taps=taps)
    shape = (2, 112, 98, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    overlay = {"file": str(saliency), "num_classes": 0}
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=True,
        num_classes=0,
        img_size=(112, 98),
        pretrained_cfg_overlay=overlay,
    ).eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    pixels = (pixels - mean) / std
    with torch.inference_mode():
        raw = model.forward_intermediates(
            pixels, indices=[3, 11], return_prefix_tokens=True, output_fmt="NLC", norm=False
        )[1]
        final = model.forward_features(pixels)
    found = backbone.forward(images)
    for tap, (patch, prefix) in zip(taps[:2], raw, strict=True):
        assert torch.equal(found[tap], patch)
        assert torch.equal(found[f"{tap}/prefix"], prefix)
    assert torch.equal(found["norm"], final[:, 1:])
    assert torch.equal(found["norm/prefix"], final[:, :1])
    assert backbone.tap_shapes["norm"].grid == (8, 7)


def test_a_real_file_cut_short_or_changed_in_part_is_refused(saliency, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(saliency.read_bytes()[:-100])
    with pytest.raises(InvalidInputError, match="damaged"):
        load("dinov2_s", weights=cut)
    state = load_file(saliency)
    state["blocks.5.mlp.fc1.weight"] = state["blocks.5.mlp.fc1.weight"][:-1].clone()
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(InvalidInputError, match=r"blocks\.5\.mlp\.fc1\.weight"):
        load("dinov2_s", weights=tmp_path / "narrow.safetensors")
    for name in ("dinov2_b", "dinov2_s_reg", "dinov3_s"):
        with pytest.raises(InvalidInputError, match="does not fit"):
            load(name, weights=saliency)

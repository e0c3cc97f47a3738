import hashlib

import numpy as np
import pytest

from featstore.datasets import open_dataset
from featstore.datasets.furnish import build_camera, build_scene
from featstore.datasets.raycast import N_PLANES, _window, cast
from featstore.datasets.scenes import CLASSES, Camera, Dice
from featstore.datasets.shading import shade
from featstore.errors import InvalidInputError, NotFoundError
from featstore.images import decode, decode_label

HW = (48, 64)
WHOLE = (slice(0, 48), slice(0, 64))


def view(seed, number, index=0):
    scene, circles = build_scene(seed, number)
    camera = build_camera(seed, number, index, scene=scene, circles=circles)
    return scene, camera, cast(scene, camera, HW)


def points_seen(camera, hits):
    """Unproject with the pinhole's own formula, half-pixel centres and z-depth."""
    u = (np.arange(HW[1]) + 0.5 - HW[1] / 2) / (camera.focal * HW[1])
    v = (np.arange(HW[0]) + 0.5 - HW[0] / 2) / (camera.focal * HW[1])
    axes = [np.array(axis) for axis in (camera.forward, camera.right, camera.down)]
    ray = axes[0] + u[None, :, None] * axes[1] + v[:, None, None] * axes[2]
    return np.array(camera.at) + hits.depth[..., None].astype(np.float64) * ray


def test_dice_roll_the_same_numbers_for_ever():
    dice = Dice(0, 1, 2)
    assert [dice.integer(0, 999) for _ in range(5)] == [881, 289, 871, 125, 176]


def test_one_picture_is_the_same_on_every_machine():
    """The operations used give the same bits everywhere, so the bytes are pinned."""
    reader = open_dataset("rooms:n=10,seed=0,size=48x64")
    item = reader.items()[3]
    digests = [
        hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        for array in (
            decode(reader.read_image(item)),
            *(decode_label(reader.read_label(item, kind))[0] for kind in item.label_kinds),
        )
    ]
    assert digests == [
        "15938c575ba6949e",
        "04206d858703c1b8",
        "b31fa20955e56382",
        "10070fbbb391dcc9",
    ]


def test_the_cameras_axes_are_orthonormal():
    for number in range(5):
        _, camera, _ = view(0, number)
        axes = np.array([camera.forward, camera.right, camera.down])
        np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
        assert camera.down[1] < 0


@pytest.mark.parametrize("number", range(6))
def test_depth_is_exact_along_the_optical_axis(number):
    scene, camera, hits = view(1, number)
    points = points_seen(camera, hits)
    for thing in np.unique(hits.thing):
        mine = points[hits.thing == thing]
        if thing < N_PLANES:
            side = scene.size[thing // 2] if thing % 2 else 0.0
            np.testing.assert_allclose(mine[:, thing // 2], side, atol=1e-4)
            continue
        solid = scene.solids[thing - N_PLANES]
        offset = mine - np.array(solid.centre)
        cosine, sine = solid.turn
        own = np.stack(
            [
                cosine * offset[:, 0] + sine * offset[:, 2],
                offset[:, 1],
                cosine * offset[:, 2] - sine * offset[:, 0],
            ],
            axis=1,
        )
        if solid.shape == "sphere":
            np.testing.assert_allclose(np.linalg.norm(own, axis=1), solid.half[0], atol=1e-3)
        elif solid.shape == "box":
            reach = np.abs(own) - np.array(solid.half)
            np.testing.assert_allclose(reach.max(axis=1), 0, atol=1e-4)
        else:
            radius = np.hypot(own[:, 0], own[:, 2]) - solid.half[0]
            height = np.abs(own[:, 1]) - solid.half[1]
            np.testing.assert_allclose(np.maximum(radius, height), 0, atol=1e-3)


def test_nothing_stands_between_the_camera_and_what_it_sees():
    """March along each ray in small steps: no point before the hit lies inside of a solid."""
    scene, camera, hits = view(2, 1)
    ends = points_seen(camera, hits)
    start = np.array(camera.at)
    for part in np.linspace(0.02, 0.995, 80):
        points = start + part * (ends - start)
        for solid in scene.solids:
            x, y, z = np.moveaxis(points - np.array(solid.centre), -1, 0)
            cosine, sine = solid.turn
            x, z = cosine * x + sine * z, cosine * z - sine * x
            scaled = np.abs(np.stack([x, y, z])) / np.array(solid.half)[:, None, None]
            inside = {
                "box": scaled.max(axis=0) < 0.98,
                "sphere": (scaled**2).sum(axis=0) < 0.98,
                "cylinder": (np.hypot(scaled[0], scaled[2]) < 0.98) & (scaled[1] < 0.98),
            }[solid.shape]
            assert not inside.any(), solid


def test_a_ray_that_runs_along_an_axis_still_ends_at_a_wall():
    scene, _ = build_scene(0, 0)
    straight = Camera(
        at=(1.0, 1.5, 1.0),
        forward=(0.0, 0.0, 1.0),
        right=(-1.0, 0.0, 0.0),
        down=(0.0, -1.0, 0.0),
        focal=1.0,
        exposure=0.3,
        blue=1.0,
        noise=1.0,
        salt=0,
    )
    depth = cast(scene, straight, (3, 3)).depth
    assert np.isfinite(depth).all()
    assert (depth > 0).all()


def test_pictures_are_neither_empty_nor_flat():
    reader = open_dataset("rooms:n=25,seed=5,size=60x80")
    for item in reader.items():
        pixels = decode(reader.read_image(item))
        depth, valid = decode_label(reader.read_label(item, "depth"))
        assert valid.all()
        assert depth.dtype == np.float32
        assert 0.2 < depth.min() < depth.max() < 10
        assert pixels.std() > 8
        assert 40 < pixels.mean() < 220


def test_masks_tell_what_things_are():
    reader = open_dataset("rooms:n=25,seed=5,size=60x80")
    seen = set()
    for item in reader.items():
        classes, _ = decode_label(reader.read_label(item, "classes"))
        instances, _ = decode_label(reader.read_label(item, "instances"))
        names = np.array(reader.class_names())[classes]
        assert set(names[instances == 0].tolist()) <= {"wall", "floor", "ceiling"}
        for instance in np.unique(instances[instances > 0]):
            assert len(set(names[instances == instance].tolist())) == 1
        seen |= set(names.ravel().tolist())
    assert len(seen) > 8
    assert seen <= set(CLASSES)


@pytest.mark.parametrize(("n", "n_test"), [(2, 1), (5, 1), (10, 2), (25, 4), (250, 50)])
def test_a_fifth_is_for_testing_and_no_scene_is_cut(n, n_test):
    items = open_dataset(f"rooms:n={n}").items()
    assert len(items) == n
    assert sum(item.splits == ("test",) for item in items) == n_test
    groups = {
        split: {i.group for i in items if i.splits == (split,)} for split in ("train", "test")
    }
    assert groups["train"]
    assert not groups["train"] & groups["test"]


def test_more_pictures_keep_those_there_are():
    few, many = open_dataset("rooms:n=50,size=48x64"), open_dataset("rooms:n=60,size=48x64")
    assert list(many.items()[:50]) == list(few.items())
    assert many.read_image(many.items()[7]) == few.read_image(few.items()[7])


def test_seeds_scenes_and_views_differ_and_sizes_have_paths_of_their_own():
    readers = [open_dataset(f"rooms:n=10,seed={seed},size=48x64") for seed in (0, 1)]
    images = [reader.read_image(item) for reader in readers for item in reader.items()]
    assert len(set(images)) == len(images)
    paths = [
        {item.path for item in open_dataset(f"rooms:n=10,{options}").items()}
        for options in ("seed=0", "seed=1", "seed=0,size=48x64")
    ]
    assert len(set.union(*paths)) == 30


def test_rendered_pictures_are_kept_up_to_a_bound(monkeypatch):
    """In repeated passes the first pictures are found again; a picture more costs no memory."""
    monkeypatch.setattr("featstore.datasets.kept.KEPT_BYTES", 60_000)
    reader = open_dataset("rooms:n=10,size=48x64")
    items, rendered = reader.items(), []
    render = reader._render
    monkeypatch.setattr(reader, "_render", lambda *place: rendered.append(place) or render(*place))
    images = [reader.read_image(item) for item in items]
    kept = sum(len(part) for parts in reader._kept._pictures.values() for part in parts.values())
    assert 0 < len(reader._kept._pictures) < 10
    assert kept + reader._kept._free_bytes == 60_000
    for item in items:
        reader.read_label(item, "depth")
    assert [reader.read_image(item) for item in items] == images
    assert len(rendered) == 10 + 2 * (10 - len(reader._kept._pictures))


def test_short_cuts_change_no_pixel(monkeypatch):
    """Solids are looked for only where they can be; looking everywhere must find the same."""
    near = [
        (scene, camera)
        for number in range(20)
        for scene, camera, _ in [view(4, number)]
        if any(_window(solid, camera, HW) == WHOLE for solid in scene.solids)
    ]
    assert len(near) > 3
    quick = [cast(scene, camera, HW) for scene, camera in near]
    pictures = [shade(*pair, hits) for pair, hits in zip(near, quick, strict=True)]
    monkeypatch.setattr("featstore.datasets.raycast._window", lambda *_: WHOLE)
    monkeypatch.setattr("featstore.datasets.shading._is_within", lambda *_: True)
    for (scene, camera), hits, picture in zip(near, quick, pictures, strict=True):
        slow = cast(scene, camera, HW)
        np.testing.assert_array_equal(slow.depth, hits.depth)
        np.testing.assert_array_equal(slow.thing, hits.thing)
        np.testing.assert_array_equal(shade(scene, camera, slow), picture)


@pytest.mark.parametrize("options", ["n=1", "n=0", "n=x", "n=-3", "seed=-1", "size=8x8", "size=a"])
def test_a_bad_value_is_refused(options):
    with pytest.raises(InvalidInputError):
        open_dataset(f"rooms:{options}")


def test_a_path_is_refused_and_an_unknown_picture_too():
    with pytest.raises(InvalidInputError, match="options alone"):
        open_dataset("rooms:/data,n=5")
    with pytest.raises(NotFoundError, match="picture"):
        open_dataset("rooms:n=5").read_image(open_dataset("rooms:n=5,seed=9").items()[0])

import hashlib

import numpy as np
import pytest

from featstore.datasets import creatures, open_dataset
from featstore.datasets.creature_bodies import NAMES, bearing
from featstore.datasets.creature_paint import paint
from featstore.datasets.creatures import FACTORS, SHIFT, SKELETON, identity_offsets
from featstore.errors import InvalidInputError, NotFoundError
from featstore.images import decode

SMALL = "size=64"
FEW = f"creatures:n=60,identities=6,kinds=2,{SMALL}"


def keypoints(reader):
    return np.array([item.attributes["keypoints"] for item in reader.items()])


def sides(reader):
    boxes = np.array([item.attributes["box"] for item in reader.items()])
    return (boxes[:, 2:] - boxes[:, :2]).max(axis=1)


def shifts(offsets, options=""):
    """How far the keypoints lie beside the joints, in longer sides of the box: right and up."""
    joints = keypoints(open_dataset(f"{FEW},offsets=none{options}"))
    reader = open_dataset(f"{FEW},offsets={offsets}{options}")
    gap = (keypoints(reader) - joints)[..., :2] / sides(reader)[:, None, None]
    return gap * [1, -1]


def test_one_picture_is_the_same_on_every_machine():
    """The operations used give the same bits everywhere, so the bytes are pinned."""
    reader = open_dataset("creatures:n=10,seed=0,size=96x128")
    item = reader.items()[3]
    pixels = decode(reader.read_image(item))
    assert pixels.shape == (96, 128, 3)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "309e907c9c46f5c2"
    assert item.attributes["keypoints"][0] == [60.02, 21.22, 2]
    assert item.attributes["box"] == [53.89, 13.08, 89.08, 62.44]


def test_an_angle_becomes_a_unit_vector():
    for angle in (-1.5, -0.2, 0.0, 0.7, 2.0):
        cosine, sine = bearing(angle)
        assert cosine**2 + sine**2 == pytest.approx(1)
        assert sine == pytest.approx(np.sin(2 * np.arctan(angle / 2)))


def test_an_identity_marks_all_its_pictures_by_one_convention():
    gap = shifts("planted")
    for identity in range(6):
        forward, up = identity_offsets(0, identity).T
        mine = gap[identity::6]
        facing = np.sign((mine[..., 0] * forward).sum(axis=1))
        np.testing.assert_allclose(mine[..., 1], np.broadcast_to(up, mine.shape[:2]), atol=1e-3)
        np.testing.assert_allclose(mine[..., 0], facing[:, None] * forward, atol=1e-3)
        assert set(facing.tolist()) == {-1.0, 1.0}


def test_forward_is_where_the_animal_looks_to():
    joints = keypoints(open_dataset(f"{FEW},offsets=none"))
    nose, tail = (joints[:, NAMES.index(name), 0] for name in ("nose", "root_of_tail"))
    gap = shifts("planted")[..., 0]
    forward = np.stack([identity_offsets(0, number % 6)[:, 0] for number in range(60)])
    # Except for the few that turn their heads to their tails.
    assert (np.sign(nose - tail) == np.sign((gap * forward).sum(axis=1))).mean() > 0.95


def test_conventions_are_equally_strong_mix_few_factors_and_are_alike_left_and_right():
    offsets = np.stack([identity_offsets(5, identity) for identity in range(30)])
    np.testing.assert_allclose((offsets**2).sum(axis=2).mean(axis=1) ** 0.5, SHIFT)
    assert np.linalg.matrix_rank(offsets.reshape(30, -1), tol=1e-9) == FACTORS
    order = list(SKELETON.mirror_order())
    assert order != sorted(order)
    np.testing.assert_array_equal(offsets[:, order], offsets)
    assert len({part.tobytes() for part in offsets}) == 30


def test_keypoints_are_those_of_ap10k_with_its_sigmas():
    assert SKELETON.sigmas is not None
    assert SKELETON.sigmas[NAMES.index("root_of_tail")] == 0.035
    assert SKELETON.sigmas[NAMES.index("left_hip")] == 0.107


def test_shuffled_conventions_are_those_of_identities_but_tell_nothing_of_them():
    gap = shifts("shuffled")
    known = np.stack([identity_offsets(0, identity) for identity in range(6)])
    mirrored = known * [-1, 1]
    distance = np.abs(gap[:, None] - np.concatenate([known, mirrored])).max(axis=(2, 3))
    assert (distance.min(axis=1) < 1e-3).all()
    dealt = distance.argmin(axis=1) % 6
    assert set(dealt.tolist()) == set(range(6))
    assert 2 <= (dealt == np.arange(60) % 6).sum() <= 20


def test_pictures_crops_and_splits_do_not_depend_on_the_conventions():
    readers = [open_dataset(f"{FEW},offsets={o}") for o in ("planted", "shuffled", "none")]
    assert len({reader.spec for reader in readers}) == 3
    for items in zip(*(reader.items() for reader in readers), strict=True):
        assert len({(item.path, item.crop, item.splits, item.label) for item in items}) == 1
    images = [[reader.read_image(item) for item in reader.items()[:4]] for reader in readers]
    assert images[0] == images[1] == images[2]


def test_a_crop_is_a_square_in_the_picture_with_the_animal_in_it():
    for item in open_dataset(FEW).items():
        x0, y0, x1, y1 = item.crop
        box = item.attributes["box"]
        assert x1 - x0 == pytest.approx(y1 - y0, abs=0.021)
        assert x1 - x0 == pytest.approx(1.25 * max(box[2] - box[0], box[3] - box[1]), abs=0.05)
        assert min(x0, y0) >= 0
        assert max(x1, y1) <= 64.01
        assert (x0 <= box[0], y0 <= box[1], x1 >= box[2], y1 >= box[3]) == (True,) * 4
        assert item.group == item.path.removesuffix(".npy")


def test_the_box_is_what_the_animal_covers(monkeypatch):
    """In front of pure magenta, the animal's own pixels are the ones of another colour."""
    paint = "featstore.datasets.creature_paint"
    magenta = np.array([1, 0, 1], np.float32)[:, None, None]
    monkeypatch.setattr(
        f"{paint}.landscape", lambda view, *_: magenta * np.ones((3, *view.hw), np.float32)
    )
    monkeypatch.setattr(f"{paint}.draw_things", lambda *_: None)
    monkeypatch.setattr(f"{paint}.cast_shadow", lambda *_: None)
    reader = open_dataset("creatures:n=12,size=160,offsets=none")
    n_inside = 0
    for item in reader.items():
        pixels = decode(reader.read_image(item))
        is_animal = (pixels[..., [0, 2]].min(axis=2) < 150) | (pixels[..., 1] > 40)
        rows, columns = (np.flatnonzero(is_animal.any(axis=axis)) for axis in (1, 0))
        covered = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose(covered, item.attributes["box"], atol=1.5)
        n_inside += sum(is_animal[int(y), int(x)] for x, y, _ in item.attributes["keypoints"])
    assert n_inside >= 0.98 * 12 * len(NAMES)


def test_eyes_that_are_seen_are_dark_and_others_are_hidden_behind_the_head():
    reader = open_dataset("creatures:n=30,size=160,offsets=none")
    seen, dark = [], []
    for item in reader.items():
        pixels = decode(reader.read_image(item)).mean(axis=2)
        for x, y, v in item.attributes["keypoints"][:2]:
            seen.append(v == 2)
            dark.append(pixels[int(y), int(x)] < 45)
    seen, dark = np.array(seen), np.array(dark)
    assert 0.3 < seen.mean() < 0.9
    assert dark[seen].mean() > 0.97
    assert dark[seen].mean() > dark[~seen].mean() + 0.2


def test_the_side_that_is_turned_away_is_hidden():
    marked = keypoints(open_dataset("creatures:n=200,size=64"))[..., 2]
    assert set(marked.ravel().tolist()) == {1.0, 2.0}
    left, right = NAMES.index("left_shoulder"), NAMES.index("right_shoulder")
    assert (marked[:, left] + marked[:, right] == 3).mean() > 0.6


def test_pictures_are_neither_empty_nor_flat():
    reader = open_dataset("creatures:n=40,size=64")
    for item in reader.items():
        pixels = decode(reader.read_image(item))
        assert pixels.std() > 8
        assert 25 < pixels.mean() < 230


@pytest.mark.parametrize(("n", "identities"), [(10, 40), (10, 1), (12, 4), (400, 40), (30, 3)])
def test_every_split_has_pictures(n, identities):
    items = open_dataset(f"creatures:n={n},identities={identities},{SMALL}").items()
    counts = {split: sum(item.splits == (split,) for item in items) for split in
              ("train", "val", "test")}  # fmt: skip
    assert sum(counts.values()) == len(items) == n
    assert counts["train"] > counts["test"] >= counts["val"] >= 1
    if n == 400:
        assert counts == {"train": 280, "val": 40, "test": 80}
        assert {item.label for item in items if item.splits == ("test",)} == {
            f"creature_{number:03d}" for number in range(40)
        }


def test_more_pictures_and_identities_keep_those_there_are():
    few = open_dataset(f"creatures:n=20,identities=5,{SMALL}")
    many = open_dataset(f"creatures:n=40,identities=5,{SMALL}")
    assert list(many.items()[:20]) == list(few.items())
    wide = {item.path: item for item in
            open_dataset(f"creatures:n=40,identities=10,{SMALL}").items()}  # fmt: skip
    assert all(wide[item.path] == item for item in few.items())
    assert many.read_image(many.items()[7]) == few.read_image(few.items()[7])


def test_seeds_identities_and_pictures_differ():
    readers = [open_dataset(f"creatures:n=10,identities=5,seed={seed},{SMALL}") for seed in (0, 1)]
    images = [reader.read_image(item) for reader in readers for item in reader.items()]
    assert len(set(images)) == 20
    assert len({item.path for reader in readers for item in reader.items()}) == 20


def test_painted_pictures_are_kept_up_to_a_bound(monkeypatch):
    monkeypatch.setattr("featstore.datasets.kept.KEPT_BYTES", 40_000)
    painted = []
    monkeypatch.setattr(creatures, "paint", lambda *args: painted.append(args) or paint(*args))
    reader = open_dataset(f"creatures:n=10,{SMALL}")
    items = reader.items()
    images = [reader.read_image(item) for item in items]
    n_kept = len(reader._kept._pictures)
    assert 0 < n_kept < 10
    assert [reader.read_image(item) for item in items] == images
    assert len(painted) == 10 + (10 - n_kept)


@pytest.mark.parametrize(
    "options",
    ["n=9", "identities=0", "kinds=0", "seed=-1", "size=8x8", "size=a", "offsets=random", "n=x"],
)
def test_a_bad_value_is_refused(options):
    with pytest.raises(InvalidInputError):
        open_dataset(f"creatures:{options}")


def test_a_path_is_refused_and_an_unknown_picture_too():
    with pytest.raises(InvalidInputError, match="options alone"):
        open_dataset("creatures:/data,n=10")
    with pytest.raises(NotFoundError, match="picture"):
        open_dataset("creatures:n=10").read_image(open_dataset("creatures:n=10,seed=9").items()[0])

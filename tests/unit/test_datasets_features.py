import h5py
import numpy as np
import pytest
import torch

from featstore.datasets import open_dataset
from featstore.errors import BadImageError, InvalidInputError, NotFoundError
from featstore.types import TapShape
from tests.datasets import save_image

TOKENS = np.random.default_rng(0).standard_normal((3, 7, 5)).astype(np.float32)


def table(root, n_rows=3, name="tokens.csv"):
    lines = ["path,split", *(f"{n}.png,train" for n in range(n_rows))]
    (root / name).write_text("\n".join(lines) + "\n")


def save(path, array):
    """Write one array in the format that the file's ending names."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(array), path)
    else:
        with h5py.File(path, "w") as file:
            file["deep/tokens"] = array
    return path


@pytest.mark.parametrize("ending", ["npy", "pt", "h5"])
def test_one_array_for_all_images(tmp_path, ending):
    path = save(tmp_path / f"tokens.{ending}", TOKENS)
    table(tmp_path)
    reader = open_dataset(f"features:{path},tap=block:8,grid=2x3")
    assert reader.taps() == (TapShape(tap="block:8", dim=5, grid=(2, 3), n_prefix=1),)
    features = reader.read_features(reader.items()[1])
    np.testing.assert_array_equal(features["block:8"], TOKENS[1, 1:])
    np.testing.assert_array_equal(features["block:8/prefix"], TOKENS[1, :1])


@pytest.mark.parametrize("ending", ["npy", "pt", "h5"])
def test_one_file_an_image(tmp_path, ending):
    lines = ["path,features"]
    for number in range(3):
        save(tmp_path / f"{number}.{ending}", TOKENS[number, 1:])
        lines.append(f"{number}.png,{number}.{ending}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    for place in (tmp_path, tmp_path / "manifest.csv"):
        reader = open_dataset(f"features:{place},tap=norm,grid=2x3")
        features = reader.read_features(reader.items()[2])
        np.testing.assert_array_equal(features["norm"], TOKENS[2, 1:])
        assert list(features) == ["norm"]


def test_rows_without_an_image_of_their_own_have_bytes_of_their_own(tmp_path):
    save(tmp_path / "tokens.npy", TOKENS)
    table(tmp_path)
    reader = open_dataset(f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x3")
    assert len({reader.read_image(item) for item in reader.items()}) == 3
    assert reader.image_hw(reader.items()[0]) is None


def test_images_give_their_bytes_and_size(tmp_path):
    save(tmp_path / "tokens.npy", TOKENS)
    table(tmp_path)
    for number in range(2):
        save_image(tmp_path / "images" / f"{number}.png", seed=number)
    text = f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x3,images={tmp_path}/images"
    reader = open_dataset(text)
    assert reader.image_hw(reader.items()[0]) == (24, 32)
    assert reader.read_image(reader.items()[1]) == (tmp_path / "images" / "1.png").read_bytes()
    with pytest.raises(BadImageError, match=r"images/2.png cannot be read"):
        reader.read_image(reader.items()[2])


def test_the_column_row_says_which_entry_is_whose(tmp_path):
    save(tmp_path / "tokens.npy", TOKENS)
    (tmp_path / "manifest.csv").write_text("path,row\nb.png,2\na.png,0\n")
    reader = open_dataset(f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x3")
    np.testing.assert_array_equal(
        reader.read_features(reader.items()[0])["norm/prefix"], TOKENS[2, :1]
    )
    (tmp_path / "manifest.csv").write_text("path,row\nb.png,3\n")
    with pytest.raises(InvalidInputError, match=r"Line 2 of .*column 'row'.*from 0 to 2"):
        open_dataset(f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x3")


def test_a_table_of_another_length_is_refused(tmp_path):
    save(tmp_path / "tokens.npy", TOKENS)
    table(tmp_path, n_rows=2)
    with pytest.raises(InvalidInputError, match=r"lists 2 images and .* holds 3 entries"):
        open_dataset(f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x3")


def test_a_missing_table_says_what_to_make(tmp_path):
    save(tmp_path / "tokens.npy", TOKENS)
    with pytest.raises(InvalidInputError, match=r"Make .*tokens.csv with the columns path"):
        open_dataset(f"features:{tmp_path}/tokens.npy,tap=norm,grid=2x3")


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((3, 9, 5), "tap=norm", TapShape(tap="norm", dim=5, grid=(3, 3))),
        ((3, 5), "tap=norm.mean", TapShape(tap="norm.mean", dim=5, grid=None)),
        ((3, 5, 2, 4), "tap=stage:2,grid=2x4", TapShape(tap="stage:2", dim=5, grid=(2, 4))),
        ((3, 2, 4, 5), "tap=stage:2,grid=2x4", TapShape(tap="stage:2", dim=5, grid=(2, 4))),
    ],
)
def test_the_axes_are_told_by_shape_and_grid(tmp_path, shape, options, expected):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    save(tmp_path / "tokens.npy", array)
    table(tmp_path)
    reader = open_dataset(f"features:{tmp_path}/tokens.npy,{options}")
    assert reader.taps() == (expected,)
    values = reader.read_features(reader.items()[1])[expected.tap]
    channels_last = np.moveaxis(array[1], 0, -1) if shape == (3, 5, 2, 4) else array[1]
    np.testing.assert_array_equal(values.reshape(-1, 5), channels_last.reshape(-1, 5))


def test_pooled_features_are_taken_whole(tmp_path):
    save(tmp_path / "tokens.npy", TOKENS[:, 0])
    table(tmp_path)
    reader = open_dataset(f"features:{tmp_path}/tokens.npy,tap=norm.cls")
    np.testing.assert_array_equal(reader.read_features(reader.items()[2])["norm.cls"], TOKENS[2, 0])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 7, 5), "tap=norm", r"grid=16x16"),
        ((3, 7, 5), "tap=norm,grid=3x3", r"at most 7 tokens"),
        ((3, 5), "tap=norm", r"pooled \(norm.mean"),
        ((3, 9, 5), "tap=norm.cls", r"dense for features of shape"),
        ((3, 4, 4, 4), "tap=norm,grid=4x4", r"not ambiguous"),
        ((3, 5, 2, 4), "tap=norm,grid=4x2", r"two neighbouring sizes"),
        ((3, 9, 5), "tap=layer3", r"`tap` must be block:N"),
        ((3, 9, 5), "tap=block:-1", r"counted from the front"),
        ((3, 9, 5), "grid=3x3", r"Example: features:FILE,tap=norm"),
        ((3, 0, 5), "tap=norm", r"holds no features"),
    ],
)
def test_features_that_do_not_fit_their_tap_are_refused(tmp_path, shape, options, message):
    save(tmp_path / "tokens.npy", np.zeros(shape, np.float32))
    table(tmp_path)
    with pytest.raises(InvalidInputError, match=message):
        open_dataset(f"features:{tmp_path}/tokens.npy,{options}")


def test_one_of_several_arrays_is_picked_by_name(tmp_path):
    table(tmp_path)
    torch.save({"a": torch.zeros(3, 4, 5), "b": torch.ones(3, 4, 5)}, tmp_path / "tokens.pt")
    with h5py.File(tmp_path / "tokens.h5", "w") as file:
        file["a"], file["b"] = np.zeros((3, 4, 5)), np.ones((3, 4, 5))
    for ending in ("pt", "h5"):
        text = f"features:{tmp_path}/tokens.{ending},tap=norm"
        with pytest.raises(NotFoundError, match=r"Known: a, b. Pick one with array=NAME"):
            open_dataset(text)
        reader = open_dataset(f"{text},array=b")
        assert (reader.read_features(reader.items()[0])["norm"] == 1).all()


def test_bfloat16_is_widened_exactly(tmp_path):
    table(tmp_path)
    tokens = torch.from_numpy(TOKENS[:, :4]).bfloat16()
    torch.save(tokens, tmp_path / "tokens.pt")
    reader = open_dataset(f"features:{tmp_path}/tokens.pt,tap=norm")
    values = reader.read_features(reader.items()[1])["norm"]
    np.testing.assert_array_equal(values, tokens[1].float().numpy())


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    table(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "tokens.pt")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        open_dataset(f"features:{tmp_path}/tokens.pt,tap=norm")


class Harmful:
    """Would raise SystemExit if it were unpickled."""

    def __reduce__(self):
        return (exit, (1,))


def test_integers_and_other_shapes_stop_that_image_alone(tmp_path):
    save(tmp_path / "0.npy", TOKENS[0])
    save(tmp_path / "1.npy", TOKENS[1, :, :4])
    save(tmp_path / "2.npy", np.zeros((7, 5), np.int64))
    (tmp_path / "3.npy").write_bytes(b"broken")
    lines = ["path,features", *(f"{n}.png,{n}.npy" for n in range(5))]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    reader = open_dataset(f"features:{tmp_path},tap=norm,grid=2x3")
    messages = [r"Line 3 .*shape \(7, 4\)", "floating point", "cannot be read", "cannot be read"]
    assert reader.read_features(reader.items()[0])
    for item, message in zip(reader.items()[1:], messages, strict=True):
        with pytest.raises(BadImageError, match=message):
            reader.read_features(item)


def test_a_row_without_a_file_of_features_is_named(tmp_path):
    (tmp_path / "manifest.csv").write_text("path,label\na.png,dog\n")
    with pytest.raises(InvalidInputError, match=r"Line 2 .*column 'features'.*Got nothing"):
        open_dataset(f"features:{tmp_path},tap=norm")

import pytest

from featstore.datasets import default_name, open_dataset
from featstore.datasets.common import Argument, parse_argument, parse_size
from featstore.errors import InvalidInputError, NotFoundError
from tests.datasets import save_image


@pytest.mark.parametrize(
    ("text", "path", "options"),
    [
        ("/data/nyu", "/data/nyu", {}),
        ("/data/a,b/c", "/data/a,b/c", {}),
        ("x.mat,depth=rawDepths", "x.mat", {"depth": "rawDepths"}),
        ("n=5,seed=1", "", {"n": "5", "seed": "1"}),
        ("f.npy,manifest=/a,b/t.csv,tap=norm", "f.npy", {"manifest": "/a,b/t.csv", "tap": "norm"}),
        ("", "", {}),
    ],
)
def test_an_argument_is_a_path_and_options(text, path, options):
    assert parse_argument(text) == Argument(path=path, options=options)


def test_an_option_given_twice_is_refused():
    with pytest.raises(InvalidInputError, match="given once"):
        parse_argument("n=5,n=6")


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("240x320", (240, 320))])
def test_a_size_is_one_number_or_two(text, size):
    assert parse_size(text, name="size") == size


@pytest.mark.parametrize("text", ["", "x", "12x", "x12", "12xa", "-3"])
def test_a_bad_size_is_refused(text):
    with pytest.raises(InvalidInputError, match="N or HxW"):
        parse_size(text, name="size")


def test_an_unknown_format_offers_the_nearest():
    with pytest.raises(NotFoundError, match=r"'nyuu'. Did you mean 'nyu'"):
        open_dataset("nyuu:/data")


@pytest.mark.parametrize("text", ["nyu", "", "/data/nyu", "a/b=nyu:/x"])
def test_a_text_that_is_no_spec_names_the_formats(text):
    with pytest.raises(InvalidInputError, match=r"FORMAT:PATH.*manifest, nyu, nyu_hf, rooms"):
        open_dataset(text)


def test_a_name_must_be_fit_for_a_folder():
    with pytest.raises(InvalidInputError, match="letter or digit first"):
        open_dataset(".hidden=rooms:")


@pytest.mark.parametrize(
    "reader",
    [
        "nyu",
        "folder",
        "manifest",
        "features",
        "voc",
        "coco",
        "ade20k",
        "cityscapes",
        "bsds",
        "nyu_hf",
    ],
)
def test_a_missing_path_is_one_clear_line(reader, tmp_path):
    with pytest.raises(InvalidInputError, match=r"no file or folder .*absent.* exists; check"):
        open_dataset(f"{reader}:{tmp_path}/absent/here")
    with pytest.raises(InvalidInputError, match="needs a path"):
        open_dataset(f"{reader}:")


@pytest.mark.parametrize(
    "reader", ["nyu", "folder", "features", "voc", "coco", "ade20k", "cityscapes", "bsds", "nyu_hf"]
)
def test_an_empty_folder_is_one_clear_line(reader, tmp_path):
    option = ",tap=norm" if reader == "features" else ""
    with pytest.raises(InvalidInputError, match=str(tmp_path)):
        open_dataset(f"{reader}:{tmp_path}{option}")


def test_the_name_is_that_of_the_file_or_folder(tmp_path):
    save_image(tmp_path / "my photos (2024)" / "a.png")
    assert open_dataset(f"folder:{tmp_path}/my photos (2024)/").name == "my_photos_2024_"
    assert default_name("nyu", f"{tmp_path}/my photos (2024)/a.png") == "a"
    assert default_name("rooms", "n=5") == "rooms"
    assert default_name("folder", "/") == "folder"

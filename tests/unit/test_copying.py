"""A copy holds what was chosen, byte for byte; a merge loses nothing and contradicts nothing."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import featstore
from cli.featstore_app import featstore as program
from featstore import index
from featstore.compaction import compact
from featstore.copying import copy_store, merge_stores
from featstore.errors import FormatError, InvalidInputError, NotFoundError
from featstore.removal import remove_rows
from featstore.store import open_folder
from featstore.verify import verify
from tests.fakes import SHAPES, FakeReader, fake_extract, fake_plan
from tests.shrinking import KEY, TAPS, Killed, check, dying_disk, listed, numbers

N = 14


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "s.zarr"
    fake_extract(path, [FakeReader(N, bad=[3])])
    return path


@pytest.fixture(scope="module")
def truth(source):
    return numbers(source, listed(source))


def train(truth):
    return {item: found for item, found in truth.items() if int(item[:5]) % 5}


def files(path):
    return {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file()}


def record_run(path, run_id, rows, **changes):
    folder = path / "runs" / run_id
    folder.mkdir(parents=True)
    record = {"run_id": run_id, "status": "done", "feature_sets": [KEY], **changes}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "head.safetensors").write_bytes(b"weights")
    lines = [{"part": "test", "row": row, "item": item} for item, row in rows.items()]
    pq.write_table(pa.Table.from_pylist(lines), folder / "pairs.parquet")
    return folder


def test_chosen_rows_and_taps_are_copied_with_their_items_and_labels(source, tmp_path, truth):
    path = tmp_path / "copy.zarr"
    report = copy_store(source, path, where="split = 'train'", taps=["norm", "norm.mean"])
    assert [one.new_rows for one in report.feature_sets] == [len(train(truth))]
    check(path, train(truth), ("norm", "norm.mean"))
    store = featstore.open(path)
    assert list(store.feature_set().taps) == ["norm", "norm.mean"]
    assert store.feature_set().plan == featstore.open(source).feature_set().plan
    assert store.feature_set().final_norm().kind == "layer_norm"
    lines = index.query(path, "select path, item from items order by path").to_pylist()
    assert [line["path"] for line in lines] == sorted(train(truth))
    for line in lines:
        label = store.read_label("fake", line["item"], "depth")
        assert label == featstore.open(source).read_label("fake", line["item"], "depth")
        assert store.thumbnail("fake", line["item"])
    assert (report.items, report.labels) == (len(lines), 2 * len(lines))


def test_a_copy_again_writes_nothing_and_a_wider_one_adds(source, tmp_path, truth):
    path = tmp_path / "copy.zarr"
    copy_store(source, path, where="split = 'train'", taps=["norm"])
    before = {f: t for f, t in files(path).items() if "index" not in f.name}
    again = copy_store(source, path, where="split = 'train'", taps=["norm"])
    assert {f: t for f, t in files(path).items() if "index" not in f.name} == before
    assert again.feature_sets[0].reused_rows == len(train(truth))
    wide = copy_store(source, path)
    assert wide.left_out == 0
    check(path, truth)
    shards = {f: t for f, t in before.items() if "/c/" in str(f) or "ledger" in str(f)}
    assert shards.items() <= files(path).items()


def test_a_copied_store_grows_by_extraction_and_sleeps_on_what_it_has(source, tmp_path, truth):
    path = tmp_path / "copy.zarr"
    copy_store(source, path, where="split = 'train'")
    assert fake_extract(path, [FakeReader(N, bad=[3])]).new_rows == len(truth) - len(train(truth))
    check(path, truth)


def test_removed_rows_and_their_items_stay_behind(source, tmp_path, truth):
    path = tmp_path / "s.zarr"
    shutil.copytree(source, path)
    remove_rows(path, "split = 'test'")
    compact(path, min_removed=0.1)
    clean = tmp_path / "clean.zarr"
    copy_store(path, clean)
    check(clean, train(truth))
    assert index.query(clean, "select count(*) as n from items")["n"].to_pylist() == [
        len(train(truth))
    ]
    assert not (clean / "feature_sets" / KEY / "tombstones").exists()


def test_runs_come_along_with_the_rows_that_they_name(source, tmp_path):
    path, target = tmp_path / "s.zarr", tmp_path / "copy.zarr"
    shutil.copytree(source, path)
    rows = listed(path)
    chosen = {item: row for item, row in rows.items() if int(item[:5]) % 5}
    record_run(path, "deap-1", chosen)
    record_run(path, "deap-2", rows)
    record_run(path, "deap-3", chosen, status="interrupted")
    remove_rows(path, "path = '00000.npy'")
    compact(path, min_removed=0.01)  # the runs name rows of before
    report = copy_store(path, target, where="split = 'train'")
    assert report.runs == ["deap-1"]
    assert set(report.runs_left_out) == {"deap-2", "deap-3"}
    assert "3 of the rows" in report.runs_left_out["deap-2"]
    table = pq.read_table(target / "runs" / "deap-1" / "pairs.parquet").to_pylist()
    new = listed(target)
    assert {line["item"]: line["row"] for line in table} == new
    assert (target / "runs" / "deap-1" / "head.safetensors").read_bytes() == b"weights"
    assert copy_store(path, target, where="split = 'train'", runs=False).runs == []


def test_damage_in_the_source_is_found_and_named(source, tmp_path):
    path = tmp_path / "s.zarr"
    shutil.copytree(source, path)
    file = open_folder(path).feature_set(KEY).shard_file("norm", "patch", 1)
    data = bytearray(file.read_bytes())
    data[:1000] = bytes(byte ^ 1 for byte in data[:1000])
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"norm/patch/c/1.*verify --repair"):
        copy_store(path, tmp_path / "copy.zarr")


def test_what_cannot_be_copied_is_refused(source, tmp_path):
    target = tmp_path / "copy.zarr"
    with pytest.raises(InvalidInputError, match="source and the target"):
        copy_store(source, source)
    with pytest.raises(NotFoundError, match=r"Unknown tap 'nrom'\. Did you mean 'norm'"):
        copy_store(source, target, taps=["nrom"])
    with pytest.raises(NotFoundError, match="No stored row with split = 'none'"):
        copy_store(source, target, where="split = 'none'")
    with pytest.raises(InvalidInputError, match="where"):
        copy_store(source, target, where="true) or (true")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match="not a featstore store"):
        copy_store(source, tmp_path / "photos")
    assert not target.exists()


def test_a_copy_goes_to_a_url_and_comes_back(source, tmp_path, truth, monkeypatch):
    pytest.importorskip("obstore", reason="obstore, which talks to object stores, is missing")
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    url, path = f"file://{tmp_path}/there.zarr", tmp_path / "back.zarr"
    copy_store(source, url, where="split = 'train'", taps=["norm", "norm.mean"])
    assert list((tmp_path / "there.zarr").rglob("c/0/0/0"))
    again = copy_store(source, url, where="split = 'train'", taps=["norm", "norm.mean"])
    assert again.feature_sets[0].reused_rows == len(train(truth))
    remove_rows(url, "path = '00001.npy'")
    copy_store(url, path)
    left = {item: found for item, found in train(truth).items() if item != "00001.npy"}
    check(path, left, ("norm", "norm.mean"))
    with pytest.raises(InvalidInputError, match="works on a folder, not on a URL"):
        compact(url)


def test_killed_in_a_merge_the_same_merge_goes_on(tmp_path, truth, monkeypatch):
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    fake_extract(one, [FakeReader(5, bad=[3])])
    fake_extract(two, [FakeReader(N, bad=[3])])
    for n_changes in (6, 40):
        path = tmp_path / f"{n_changes}.zarr"
        with dying_disk(monkeypatch, path, n_changes), pytest.raises(Killed):
            merge_stores([one, two], path)
        merge_stores([one, two], path)
        check(path, truth)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change_the_same_copy_goes_on(source, tmp_path, truth, monkeypatch, step):
    n_changes, n_kills = 0, 0
    while True:
        path = tmp_path / f"{n_changes}.zarr"
        with dying_disk(monkeypatch, path, n_changes) as disk:
            try:
                copy_store(source, path)
            except Killed:
                n_kills += 1
        if not disk["is_dead"]:
            break
        if (path / "zarr.json").exists():
            assert verify(path).problems == [] or not (path / "feature_sets/zarr.json").exists()
        copy_store(source, path)
        check(path, truth)
        shutil.rmtree(path)
        n_changes += step
    assert n_kills >= 30 // step


def test_stores_made_apart_become_one(tmp_path, truth):
    one, two, target = (tmp_path / f"{name}.zarr" for name in ("one", "two", "all"))
    fake_extract(one, [FakeReader(9, bad=[3])])
    fake_extract(two, [FakeReader(N, bad=[3]), FakeReader(5, name="other", seed=4)], shard_rows=4)
    other = fake_plan(image_size=(32, 32))
    fake_extract(two, [FakeReader(5, name="other", seed=4)], plan=other)
    record_run(two, "deap-1", {"a": min(listed(two, "other").values())})
    report = merge_stores([one, two], target)
    assert report.left_out == 0
    assert len(index.samples(target, None, KEY)) == len(truth) + 5
    assert numbers(target, listed(target, "fake")) == truth
    assert open_folder(target).feature_set_keys() == sorted([KEY, other.key()])
    assert verify(target).problems == []
    assert report.runs == ["deap-1"]
    before = files(target)
    assert merge_stores([one, two], target).items == 0
    assert {f for f in files(target).items() if "index" not in str(f)} <= before.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 9}, "item 00000.npy of data set 'fake' is another one in each"),
        ({"format": "other.v1"}, "data set 'fake' has another format in each"),
        ({"spec": "fake:elsewhere", "seed": 9, "first": 50}, "two data sets are named 'fake'"),
    ],
)
def test_data_sets_that_contradict_each_other_are_refused(source, tmp_path, changes, message):
    reader = FakeReader(N, seed=changes.get("seed", 0))
    reader.format = changes.get("format", reader.format)
    reader.spec = changes.get("spec", reader.spec)
    if "first" in changes:
        items = [item for item in FakeReader(60).items() if item.path >= "00050.npy"]
        reader.items = lambda: items
    other, target = tmp_path / "other.zarr", tmp_path / "all.zarr"
    fake_extract(other, [reader])
    with pytest.raises(InvalidInputError, match=f"nothing was written: .*{message}"):
        merge_stores([source, other], target)
    assert not target.exists()


def test_feature_sets_labels_and_runs_that_contradict_are_refused(source, tmp_path):
    other, target = tmp_path / "other.zarr", tmp_path / "all.zarr"
    fake_extract(other, [FakeReader(N, bad=[3])], norm_weight=2.0, backbone={"name": "b", "x": 1})
    (file,) = (other / "labels" / "fake").glob("depth-*.parquet")
    table = pq.read_table(file)
    digests = pa.array(["0" * 32, *table["digest"].to_pylist()[1:]])
    place = table.column_names.index("digest")
    pq.write_table(table.set_column(place, "digest", digests), file)
    mine = tmp_path / "mine.zarr"
    shutil.copytree(source, mine)
    record_run(mine, "deap-1", {})
    record_run(other, "deap-1", {}, seed=7)
    with pytest.raises(InvalidInputError) as told:
        merge_stores([mine, other], target)
    for text in ("another norm_sha256 and another backbone", "the depth label of", "run deap-1"):
        assert text in str(told.value)


def test_a_row_that_only_part_of_the_taps_came_for_is_told(source, tmp_path):
    one, two, target = (tmp_path / f"{name}.zarr" for name in ("one", "two", "all"))
    fake_extract(one, [FakeReader(8)], shapes=SHAPES[:1])
    fake_extract(two, [FakeReader(4)], shapes=SHAPES)
    run = CliRunner().invoke
    done = run(program, ["merge", str(one), str(two), str(target)])
    assert done.exit_code == 3
    assert "4 rows lack some of the taps" in done.stderr
    assert len(index.samples(target)) == 8
    fake_extract(target, [FakeReader(8)])
    assert numbers(target, listed(target), TAPS).keys() == listed(one).keys()


def test_the_commands_say_what_they_did(source, tmp_path):
    run = CliRunner().invoke
    path = str(tmp_path / "copy.zarr")
    done = run(program, ["copy", str(source), path, "--where", "split = 'train'", "--taps", "norm"])
    assert (done.exit_code, "Copied 10 rows, 10 items, 20 labels and 0 runs" in done.stdout) == (
        0,
        True,
    )
    again = run(program, ["copy", str(source), path, "--json"])
    assert json.loads(again.stdout)["feature_sets"][0]["rows"] == 13
    assert run(program, ["merge", path]).exit_code == 2
    assert run(program, ["merge", str(tmp_path / "no.zarr"), path]).exit_code == 1

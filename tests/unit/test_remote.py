"""Stores behind a URL: against an S3 server of this process, well and badly behaved."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from fakes import FakeReader, FakeSource, content, fake_extract
from objects import KINDS, Proxy, RangeServer, s3_server, serving

import featstore
import featstore.repair
from cli.common import exit_code
from cli.featstore_app import featstore as featstore_cli
from featstore.cleanup import gc
from featstore.errors import (
    ConflictError,
    FeatstoreError,
    FormatError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from featstore.files import remove_file, write_bytes
from featstore.remote.client import Client, client_of
from featstore.remote.location import find_mirror, parse_url
from featstore.remote.mirror import synchronise
from featstore.removal import remove_rows
from featstore.rows import RowReader
from featstore.store import locate
from featstore.types import TapShape
from featstore.verify import verify

pytest.importorskip("moto.server", reason="moto, the S3 server of these tests, is not installed")
pytest.importorskip("obstore", reason="obstore, which talks to object stores, is not installed")

ROOT = Path(__file__).resolve().parents[2]
SHAPES = (
    TapShape(tap="norm", dim=8, grid=(4, 4), n_prefix=1),
    TapShape(tap="norm.mean", dim=8, grid=None),
)
NAMES = ("norm", "norm/prefix", "norm.mean")
N_IMAGES = 20
CHUNK = 4 * 4 * 8 * 2


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def s3(server, monkeypatch, tmp_path) -> Proxy:
    server.behave()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "0")
    monkeypatch.delenv("FEATSTORE_TIMEOUT_S", raising=False)
    return server


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "features.zarr"
    fake_extract(path, [FakeReader(N_IMAGES)], shapes=SHAPES)
    return path


@pytest.fixture(scope="module")
def shared_url(server, plain) -> str:
    """A store in the bucket that no test changes: the plain one, object for object."""
    url = "s3://bucket/shared/features.zarr"
    put_folder(server, plain, "shared/features.zarr")
    return url


def put_folder(server: Proxy, folder: Path, prefix: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        client = client_of(parse_url(f"s3://bucket/{prefix}"))
        for name in content(folder):
            client.upload(name, folder / name)


def fresh_cache(monkeypatch, tmp_path: Path, name: str) -> None:
    """Be another machine: nothing of the store is here."""
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / name))


def objects(url: str) -> set[str]:
    """Name everything that lies below a URL."""
    client = client_of(parse_url(url))
    found, folders = set(), [""]
    while folders:
        entries, below = client.list_folder(folders.pop())
        found |= {entry.key for entry in entries}
        folders += below
    return found


def assert_same(url: str, plain: Path, tmp_path: Path) -> None:
    """Copy a store out of the bucket by its shards and compare every byte."""
    target = tmp_path / "copied"
    shutil.rmtree(target, ignore_errors=True)
    client = client_of(parse_url(url))
    for name in objects(url):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        client.download(name, target / name)
    assert content(target) == content(plain)


def epoch(store: featstore.Store, name: str, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    stream = store.feature_set().stream([name], batch_size=3, **options)
    return [(batch.rows.copy(), batch[name].copy()) for batch in stream]


def assert_equal_epochs(one: featstore.Store, other: featstore.Store, **options) -> None:
    for name in NAMES:
        pairs = zip(epoch(one, name, **options), epoch(other, name, **options), strict=True)
        for (rows, values), (known_rows, known_values) in pairs:
            np.testing.assert_array_equal(rows, known_rows)
            np.testing.assert_array_equal(values, known_values)


def test_an_extraction_into_a_bucket_has_the_bytes_of_one_onto_the_disk(s3, plain, tmp_path):
    url = "s3://bucket/extracted/features.zarr"
    report = fake_extract(locate(url), [FakeReader(N_IMAGES)], shapes=SHAPES)
    assert (report.store, report.rows) == (url, N_IMAGES)
    assert_same(url, plain, tmp_path)
    left = [path for path in (tmp_path / "cache").rglob("*") if "c" in path.parts]
    assert not [path for path in left if path.is_file()]  # no shard stays here


@pytest.mark.parametrize(
    ("shuffle", "cache_bytes", "dtype"),
    [(False, "0", None), (True, "1G", None), ("window", "0", "float32"), ("window", "20k", None)],
)
def test_a_stream_gives_what_the_disk_gives(s3, plain, monkeypatch, shuffle, cache_bytes, dtype):
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", cache_bytes)
    near, far = featstore.open(plain), featstore.open(f"file://{plain}")
    assert_equal_epochs(far, near, shuffle=shuffle, seed=3, dtype=dtype)


def test_rows_are_read_in_any_order_and_twice(s3, shared_url, plain):
    near, far = featstore.open(plain).feature_set(), featstore.open(shared_url).feature_set()
    for name in NAMES:
        rows = [19, 0, 7, 7, 8, 3]
        np.testing.assert_array_equal(far.read(name, rows), near.read(name, rows))
    assert far.samples().equals(near.samples())
    with pytest.raises(NotFoundError, match="999"):
        far.read("norm", [999])


@pytest.mark.parametrize("shuffle", [False, "window"])
def test_neighbours_come_by_one_request_and_nothing_comes_twice(s3, shared_url, plain, shuffle):
    store = featstore.open(shared_url)
    s3.behave()
    epoch(store, "norm", shuffle=shuffle)
    ranges = [asked for asked in s3.shard_requests() if not asked.startswith("bytes=-")]
    # Three shards of a few rows: one range each (two where one thread was ahead of the other), and
    # their indexes, unless they are known.
    assert 3 <= len(ranges) <= 6
    assert len(s3.shard_requests()) - len(ranges) in (0, 3)
    n_bytes = [int(r.split("-")[1]) + 1 - int(r.split("=")[1].split("-")[0]) for r in ranges]
    assert sum(n_bytes) == N_IMAGES * (CHUNK + 4)


def test_the_cache_serves_the_second_epoch(s3, shared_url, monkeypatch):
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "1G")
    store = featstore.open(shared_url)
    first = epoch(store, "norm", shuffle="window")
    s3.behave()
    again = epoch(store, "norm", shuffle="window")
    assert s3.requests == []
    assert all((a[1] == b[1]).all() for a, b in zip(first, again, strict=True))


def test_a_damaged_cache_is_read_past(s3, shared_url, plain, monkeypatch, tmp_path):
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "1G")
    far, near = featstore.open(shared_url), featstore.open(plain)
    epoch(far, "norm")
    files = list((tmp_path / "cache/chunks").glob("??/*"))
    assert len(files) == 3
    for path in files:
        data = bytearray(path.read_bytes())
        data[4096 + 10] ^= 1
        path.write_bytes(data)
    assert_equal_epochs(far, near)


def test_one_fault_in_twenty_is_not_seen(s3, plain, monkeypatch, tmp_path):
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "8")
    url = "s3://bucket/faulty/features.zarr"
    s3.behave(0.05, seed=1)
    fake_extract(locate(url), [FakeReader(N_IMAGES)], shapes=SHAPES)
    near = featstore.open(plain)
    for number in range(2):
        fresh_cache(monkeypatch, tmp_path, f"other{number}")
        assert_equal_epochs(featstore.open(url), near, shuffle="window", seed=number)
    faults = s3.faults
    s3.behave()
    assert_same(url, plain, tmp_path)
    assert set(faults) == set(KINDS), faults


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_faults_is_a_clear_error_within_the_stated_time(
    s3, shared_url, monkeypatch, kind
):
    stream = featstore.open(shared_url).feature_set().stream(["norm"], batch_size=3)
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "1")
    s3.behave(1.0, (kind,))
    began = time.monotonic()
    with pytest.raises((StorageError, FormatError), match=r"s3://bucket.*again|damaged") as caught:
        list(stream)
    assert time.monotonic() - began < 2  # the machine may be busy
    assert "\n" not in str(caught.value)


def test_a_store_that_takes_nothing_is_a_clear_error(s3, monkeypatch):
    path = locate("s3://bucket/never/features.zarr")
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "1")
    s3.behave(1.0, ("503",))
    with pytest.raises(StorageError, match=r"zarr\.json \(503 Service Unavailable"):
        fake_extract(path, [FakeReader(4)])
    assert not (path / "zarr.json").exists()  # there first, then here


_KILLED = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import featstore.shard_job as job
from fakes import FakeReader, fake_extract
from featstore.store import locate
from featstore.types import TapShape
done, write = [], job.write_ledger
def killed(folder, tap, shard, table):
    if len(done) == 3:
        os._exit(9)
    done.append(shard)
    write(folder, tap, shard, table)
job.write_ledger = killed
shapes = (TapShape(tap="norm", dim=8, grid=(4, 4), n_prefix=1),
          TapShape(tap="norm.mean", dim=8, grid=None))
fake_extract(locate({url!r}), [FakeReader({n})], shapes=shapes)
"""


def test_killed_between_a_shard_and_its_ledger_it_goes_on_elsewhere(
    s3, plain, monkeypatch, tmp_path
):
    url = "s3://bucket/killed/features.zarr"
    told = {"root": str(ROOT), "tests": str(ROOT / "tests"), "url": url, "n": N_IMAGES}
    done = subprocess.run([sys.executable, "-c", _KILLED.format(**told)], check=False)
    assert done.returncode == 9
    ledgers = {name for name in objects(url) if "/ledger/" in name}
    shards = {name for name in objects(url) if "/c/1/" in name}
    assert (len(ledgers), len(shards)) == (3, 3)  # the second shard, and one ledger of two
    fresh_cache(monkeypatch, tmp_path, "another machine")
    report = fake_extract(locate(url), [FakeReader(N_IMAGES)], shapes=SHAPES)
    assert report.reused_rows == 8
    assert_same(url, plain, tmp_path)


def test_of_two_drivers_only_one_assigns_a_row(s3, monkeypatch, tmp_path):
    url = "s3://bucket/two/features.zarr"
    mine = locate(url)
    fresh_cache(monkeypatch, tmp_path, "theirs")
    theirs = locate(url)
    fake_extract(theirs, [FakeReader(6, name="theirs")])
    with pytest.raises(ConflictError, match=r"assignments/00000.*first"):
        fake_extract(mine, [FakeReader(6, name="mine", seed=1)])
    mine = locate(url) if find_mirror(mine) is None else mine
    synchronise(find_mirror(mine))
    report = fake_extract(mine, [FakeReader(6, name="mine", seed=1)])
    assert (report.new_rows, featstore.open(url).samples().num_rows) == (6, 12)


def test_removed_rows_are_gone_on_every_machine_and_come_back(s3, plain, monkeypatch, tmp_path):
    put_folder(s3, plain, "rm/features.zarr")
    url = "s3://bucket/rm/features.zarr"
    found = remove_rows(url, "path < '00005.npy'")
    assert (found.rows, found.store) == (5, url)
    fresh_cache(monkeypatch, tmp_path, "another machine")
    samples = featstore.open(url).samples()
    assert samples.num_rows == N_IMAGES - 5
    assert min(samples["path"].to_pylist()) == "00005.npy"
    features = featstore.open(url).feature_set()
    with pytest.raises(FeatstoreError, match="removed"):
        features.read("norm", [0, 19])
    report = fake_extract(locate(url), [FakeReader(N_IMAGES)], shapes=SHAPES)
    assert (report.new_rows, report.reused_rows) == (5, N_IMAGES - 5)
    assert verify(url).problems == []


def test_the_space_of_removed_rows_is_freed_there(s3, plain, monkeypatch, tmp_path):
    put_folder(s3, plain, "gc/features.zarr")
    url = "s3://bucket/gc/features.zarr"
    before = objects(url)
    found = remove_rows(url, '"row" < 8')
    [shard_of_all] = {name for name in before if "norm/patch/c/0/" in name}
    waiting = gc(url)
    assert (waiting.removed, waiting.waiting_bytes) == ([], found.gc_bytes)
    assert shard_of_all in objects(url)
    listed = gc(url, dry_run=True, grace_s=0)
    assert objects(url) >= before
    freed = gc(url, grace_s=0)
    assert (freed.store, freed.removed, freed.bytes) == (url, listed.removed, found.gc_bytes)
    gone = {name for name in before if "/c/0" in name or name.endswith("ledger/norm/00000.parquet")}
    assert set(freed.removed) >= gone
    assert before - objects(url) == set(freed.removed)
    assert gc(url, grace_s=0).removed == []
    fresh_cache(monkeypatch, tmp_path, "another machine")
    assert verify(url).problems == []
    assert featstore.open(url).samples().num_rows == N_IMAGES - 8
    report = fake_extract(locate(url), [FakeReader(N_IMAGES)], shapes=SHAPES)
    assert (report.new_rows, report.reused_rows) == (8, N_IMAGES - 8)


@pytest.mark.parametrize("kind", ["gone", "flipped"])
def test_a_damaged_shard_is_extracted_again(s3, plain, monkeypatch, tmp_path, kind):
    put_folder(s3, plain, f"repair/{kind}.zarr")
    url = f"s3://bucket/repair/{kind}.zarr"
    [shard] = [name for name in objects(url) if "norm/patch/c/1/" in name]
    client = client_of(parse_url(url))
    if kind == "gone":
        client.delete(shard)
    else:
        data = bytearray(client.read(shard)[0])
        data[17] ^= 1
        client.write(shard, bytes(data))
    readers = [FakeReader(N_IMAGES)]
    monkeypatch.setattr(featstore.repair, "open_readers", lambda data: readers)
    monkeypatch.setattr(
        featstore.repair, "_source", lambda folder, readers, *_: FakeSource(readers)
    )
    found = verify(url, repair=True, data=["fake=folder:/nowhere"])
    assert [problem.repaired for problem in found.problems] == [True]
    assert verify(url).problems == []
    assert_same(url, plain, tmp_path)


def test_a_lost_answer_is_no_conflict(s3):
    client = client_of(parse_url("s3://bucket/lost"))
    client.write("one", b"mine", is_new=True)
    client.write("one", b"mine", is_new=True)
    with pytest.raises(ConflictError, match="Run this again"):
        client.write("one", b"theirs", is_new=True)


def test_a_file_is_removed_there_and_here(s3, plain):
    put_folder(s3, plain, "removed")
    path = locate("s3://bucket/removed")
    [ledger] = path.glob("feature_sets/*/ledger/norm/00001.parquet")
    [folder] = path.glob("feature_sets/*/norm/patch")
    remove_file(ledger)
    remove_file(ledger)
    remove_file(folder / "c/1/0/0")
    left = objects("s3://bucket/removed")
    assert not [name for name in left if "norm/00001.parquet" in name or "norm/patch/c/1" in name]
    assert not ledger.exists()
    run = path / "runs" / "run.json"
    run.parent.mkdir()
    run.write_text("{}")
    remove_file(run)  # no part of the store
    assert not run.exists()


def test_a_file_written_during_a_download_stays(s3, plain, monkeypatch):
    put_folder(s3, plain, "overtaken")
    mirror = find_mirror(locate("s3://bucket/overtaken"))
    [path] = mirror.root.glob("feature_sets/*/zarr.json")
    other = path.read_bytes().replace(b"fake@16", b"fake@17")
    client_of(mirror.remote).write(mirror.key(path), other)
    read, newest = Client.read, other.replace(b"fake@17", b"fake@18")

    def read_slowly(client, key):
        found = read(client, key)
        write_bytes(path, newest)  # as another process would
        return found

    monkeypatch.setattr(Client, "read", read_slowly)
    assert synchronise(mirror).n_downloaded == 0
    assert path.read_bytes() == newest
    monkeypatch.undo()


def test_a_mirror_follows_its_store(s3, plain):
    put_folder(s3, plain, "followed")
    path = locate("s3://bucket/followed")
    run = path / "runs" / "mine" / "run.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    mirror = find_mirror(path)
    assert mirror is not None
    assert synchronise(mirror).n_downloaded == 0
    client = client_of(mirror.remote)
    [ledger] = [name for name in objects(mirror.remote.url) if name.endswith("norm/00001.parquet")]
    known = (path / ledger).read_bytes()
    client.delete(ledger)
    (path / "items/fake/dataset.json").unlink()
    report = synchronise(mirror)
    assert (report.n_downloaded, report.n_deleted) == (1, 1)
    assert not (path / ledger).exists()
    assert run.exists()
    client.write(ledger, known)
    assert synchronise(mirror).n_downloaded == 1
    assert (path / ledger).read_bytes() == known


def test_what_stays_wrong_is_damage_with_its_rows(s3, plain, tmp_path):
    put_folder(s3, plain, "damaged")
    url = "s3://bucket/damaged"
    client = client_of(parse_url(url))
    for name in sorted(objects(url)):
        if "/c/1/" in name:
            data = bytearray(client.read(name)[0])
            data[3] ^= 1
            client.write(name, bytes(data))
    features = featstore.open(url).feature_set()
    for name in NAMES:
        with pytest.raises(FormatError, match=r"is damaged at row 8"):
            features.read(name, [8])
        assert features.read(name, [0]).size
    report = verify(url)
    assert report.store == url
    assert {(p.kind, p.tap, p.shard) for p in report.problems} == {
        ("shard", "norm", 1),
        ("shard", "norm.mean", 1),
    }
    assert not list((tmp_path / "cache").rglob("c/1/*/*"))


def test_the_shard_of_another_row_is_damage(s3, plain):
    put_folder(s3, plain, "swapped")
    url = "s3://bucket/swapped"
    client = client_of(parse_url(url))
    for name in sorted(name for name in objects(url) if "/c/1/" in name):
        client.write(name, client.read(name.replace("/c/1/", "/c/0/"))[0])
    features = featstore.open(url).feature_set()
    for name in NAMES:
        with pytest.raises(FormatError, match=r"row 9 .*other bytes than were committed|row 8"):
            features.read(name, [9])


def test_a_small_file_that_never_comes_right_is_an_error(s3, shared_url, monkeypatch):
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "1")
    s3.behave(1.0, ("corrupted",))
    with pytest.raises(StorageError, match="another checksum"):
        locate(shared_url)


def test_verify_finds_a_good_store_good_through_faults(s3, shared_url, plain, monkeypatch):
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "8")
    s3.behave(0.05, ("corrupted", "cut", "503"), seed=2)
    assert (verify(shared_url).problems, verify(shared_url).rows) == ([], N_IMAGES)
    assert verify(shared_url).bytes == verify(plain).bytes


def test_a_lost_shard_is_damage(s3, plain):
    put_folder(s3, plain, "lost_shard")
    url = "s3://bucket/lost_shard"
    [shard] = [name for name in objects(url) if "norm/patch/c/2/" in name]
    client_of(parse_url(url)).delete(shard)
    features = featstore.open(url).feature_set()
    with pytest.raises(FormatError, match=r"The store has no .*c/2/"):
        features.read("norm", [16])


def test_a_file_url_is_read_and_written(s3, plain, tmp_path):
    url = f"file://{tmp_path}/far/features.zarr"
    fake_extract(locate(url), [FakeReader(N_IMAGES)], shapes=SHAPES)
    assert content(tmp_path / "far/features.zarr") == content(plain)
    assert_equal_epochs(featstore.open(Path(url)), featstore.open(plain), shuffle="window")


def test_a_web_server_is_read(s3, plain):
    handler = partial(RangeServer, directory=str(plain.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with serving(server):
        url = f"http://127.0.0.1:{server.server_port}/features.zarr"
        far = featstore.open(url)
        assert_equal_epochs(far, featstore.open(plain), shuffle="window")
        assert verify(url).problems == []
        with pytest.raises(InvalidInputError, match="can only be read"):
            featstore.create(url + "2")
        assert synchronise(find_mirror(far.path)).n_downloaded == 0


def test_stores_through_zarr_are_read(s3, plain, tmp_path):
    import zarr

    changed = tmp_path / "zstd.zarr"
    shutil.copytree(plain, changed)
    [array] = changed.glob("feature_sets/*/norm/patch")
    values = zarr.open_array(array, mode="r")[:]
    shutil.rmtree(array)
    made = zarr.create_array(
        zarr.storage.LocalStore(array),
        shape=values.shape,
        chunks=(1, *values.shape[1:]),
        shards=(8, *values.shape[1:]),
        dtype=values.dtype,
        fill_value=float("nan"),
    )
    made[:] = values
    put_folder(s3, changed, "zstd")
    far = featstore.open("s3://bucket/zstd").feature_set()
    known = featstore.open(plain).feature_set().read("norm", [3, 19])
    np.testing.assert_array_equal(far.read("norm", [3, 19]), known)


def test_commands_take_a_url(s3, shared_url, capsys):
    assert exit_code(featstore_cli, ["ls", "--store", shared_url]) == 0
    assert "norm.mean" in capsys.readouterr().out
    assert exit_code(featstore_cli, ["info", "--store", shared_url]) == 0
    assert shared_url in capsys.readouterr().out
    sql = "select count(*) as n from samples"
    assert exit_code(featstore_cli, ["sql", sql, "--store", shared_url]) == 0
    assert str(N_IMAGES) in capsys.readouterr().out
    assert exit_code(featstore_cli, ["verify", "--store", shared_url]) == 0
    assert exit_code(featstore_cli, ["gc", "--store", shared_url]) == 0
    assert "Removed 0 files" in capsys.readouterr().out
    assert exit_code(featstore_cli, ["compact", "--store", shared_url]) == 1
    assert "works on a folder, not on a URL" in capsys.readouterr().err
    assert exit_code(featstore_cli, ["ls", "--store", "s3://bucket/none"]) == 1
    assert "No store at s3://bucket/none" in capsys.readouterr().err


def test_a_head_learns_from_a_bucket(s3, plain, tmp_path):
    import heads
    from heads.runs import find_run, read_run

    put_folder(s3, plain, "learned")
    options = {"task": "depth", "head": "linear", "steps": 2, "seed": 1, "device": "cpu"}
    report = heads.train("s3://bucket/learned", **options)
    [run] = (tmp_path / "cache/mirrors").glob(f"*/runs/{report.run_id}")
    assert read_run(run).record["store"] == "s3://bucket/learned"
    assert find_run("s3://bucket/learned", "@last").run_id == report.run_id
    assert report.metrics["rmse"] > 0


def test_what_lies_elsewhere_is_no_store(s3):
    client_of(parse_url("s3://bucket/other")).write("readme.txt", b"hello")
    with pytest.raises(InvalidInputError, match="holds other files and no store"):
        locate("s3://bucket/other")
    with pytest.raises(StorageError, match=r"no_such_bucket.*404 Not Found"):
        locate("s3://no_such_bucket/features.zarr")


def test_a_server_that_is_not_there_is_named(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "0.5")
    with pytest.raises(StorageError, match=r"Connection refused\)\. Tried for up to 0\.5 s"):
        locate("s3://bucket/features.zarr")


def test_a_refusal_tells_how_to_sign(s3):
    s3.behave(1.0, ("403",))
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        locate("s3://bucket/refused")


def test_what_was_read_is_not_expected_again(s3, shared_url):
    features = featstore.open(shared_url).feature_set()
    reader = RowReader(features.folder, "norm")
    s3.behave()
    for expected, row in [(4, 0), (8, 5)]:
        reader.expect(np.arange(expected))
        reader.read_into(np.array([row]), reader.empty(1))
    ranges = [asked for asked in s3.shard_requests() if not asked.startswith("bytes=-")]
    row_bytes = CHUNK + 4
    assert ranges == [f"bytes=0-{4 * row_bytes - 1}", f"bytes={4 * row_bytes}-{8 * row_bytes - 1}"]


def test_threads_that_want_neighbours_ask_once(s3, shared_url):
    features = featstore.open(shared_url).feature_set()
    s3.behave()
    reader = RowReader(features.folder, "norm")
    reader.expect(np.arange(8))
    outs = [reader.empty(1) for _ in range(8)]
    threads = [
        Thread(target=reader.read_into, args=(np.array([row]), out)) for row, out in enumerate(outs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranges = [asked for asked in s3.shard_requests() if not asked.startswith("bytes=-")]
    assert len(ranges) == 1
    np.testing.assert_array_equal(np.concatenate(outs), features.read("norm", range(8)))

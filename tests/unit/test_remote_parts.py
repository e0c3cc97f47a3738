"""The pieces of stores behind a URL that need no server: URLs, lists of links, the cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from featstore.errors import FormatError, InvalidInputError
from featstore.remote import location
from featstore.remote.cache import DiskChunks, MemoryChunks, open_chunks
from featstore.remote.location import (
    Remote,
    cache_bytes,
    cache_folder,
    find_mirror,
    is_small,
    is_url,
    parse_url,
    shown,
    timeout_s,
)
from featstore.remote.pages import links
from featstore.shards import ShardLayout, crc32c

LAYOUT = ShardLayout(n_chunks=8, chunk_bytes=4096)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a/features.zarr/", "s3://bucket/a/features.zarr"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/a", "az://container/a"),
        ("file:///data/features.zarr", "file:///data/features.zarr"),
        (Path("file:///data/features.zarr"), "file:///data/features.zarr"),
        ("https://host:8080/a", "https://host:8080/a"),
    ],
)
def test_urls_are_read(text, url):
    assert is_url(text)
    assert parse_url(text).url == url


@pytest.mark.parametrize("text", ["features.zarr", "/data/s3:/x", "C:/data", "ftp://host/x", ""])
def test_paths_are_no_urls(text):
    assert not is_url(text)


@pytest.mark.parametrize("text", ["s3://", "https://me:secret@host/x", "s3://bucket/x?versionId=1"])
def test_a_url_holds_no_secret_and_no_query(text):
    with pytest.raises(InvalidInputError, match="no query or password"):
        parse_url(text)


def test_another_endpoint_is_another_mirror(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    there = parse_url("s3://bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    assert parse_url("s3://bucket/x").name != there.name
    assert "secret" not in str(parse_url("s3://bucket/x").options)


def test_the_environment_decides_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FEATSTORE_CACHE", raising=False)
    monkeypatch.setattr(location.sys, "platform", "linux")
    assert cache_folder() == tmp_path / "featstore"
    for text, n_bytes in [("0", 0), ("1000", 1000), ("1.5k", 1500), ("50G", 50 * 10**9)]:
        monkeypatch.setenv("FEATSTORE_CACHE_BYTES", text)
        assert cache_bytes() == n_bytes
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "much")
    with pytest.raises(InvalidInputError, match="50G"):
        cache_bytes()
    monkeypatch.setenv("FEATSTORE_TIMEOUT_S", "-1")
    with pytest.raises(InvalidInputError, match="positive"):
        timeout_s()


@pytest.mark.parametrize(
    ("key", "is_mirrored"),
    [
        ("zarr.json", True),
        ("items/a/00000.parquet", True),
        ("feature_sets/k/norm/patch/zarr.json", True),
        ("feature_sets/k/ledger/norm/00000.parquet", True),
        ("feature_sets/k/norm/patch/c/0/0/0", False),
        ("feature_sets/k/norm.mean/pooled/c/0/0", False),
        ("feature_sets/k/assignments/00000.parquet.7.partial", False),
        ("runs/r/run.json", False),
        (".locks/k.lock", False),
        ("index.duckdb", False),
    ],
)
def test_small_files_are_mirrored(key, is_mirrored):
    assert is_small(key) is is_mirrored


def test_a_damaged_mirror_says_what_to_do(tmp_path):
    (tmp_path / ".remote.json").write_text("{")
    with pytest.raises(FormatError, match="Delete its folder"):
        find_mirror(tmp_path / "items")


def test_a_path_is_shown_as_what_it_stands_for(tmp_path):
    assert shown(tmp_path) == str(tmp_path)
    (tmp_path / ".remote.json").write_text('{"url": "s3://bucket/x", "options": {}}')
    assert shown(tmp_path) == "s3://bucket/x"
    assert shown(tmp_path / "items") == "s3://bucket/x/items"
    assert Remote(url="http://h/x").is_read_only


def test_links_of_another_folder_are_none():
    page = """<a href="../">up</a> <a href="a.txt">a</a> <a href="./b%20c/">b</a>
    <a href="/elsewhere">no</a> <a href="http://host/x">no</a> <a href="?C=N">no</a>
    <a href="sub/deep.txt">no</a> <a name="x">no</a>"""
    assert links(page) == (["a.txt"], ["b c"])


def chunk(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, LAYOUT.chunk_bytes, np.uint8)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_chunks_come_back(tmp_path, kind):
    kept = MemoryChunks(10**6) if kind == "memory" else DiskChunks(tmp_path, 10**6)
    out = np.empty(LAYOUT.chunk_bytes, np.uint8)
    assert kept.get("shard", 3, out, LAYOUT) is None
    kept.put("shard", 3, chunk(3), LAYOUT)
    assert kept.get("shard", 3, out, LAYOUT) == crc32c(chunk(3))
    assert (out == chunk(3)).all()
    assert kept.held("shard", LAYOUT) == {3}
    assert kept.held("other", LAYOUT) == set()
    kept.drop("shard", 3, LAYOUT)
    assert kept.get("shard", 3, out, LAYOUT) is None


def test_memory_holds_no_more_than_its_limit():
    kept = MemoryChunks(2 * LAYOUT.chunk_bytes)
    for number in range(3):
        kept.put("shard", number, chunk(number), LAYOUT)
    assert kept.held("shard", LAYOUT) == {1, 2}


def test_the_disk_holds_no_more_than_its_limit_and_what_was_used_last(tmp_path):
    limit = 8 * 2 * 4096
    kept = [DiskChunks(tmp_path, limit), DiskChunks(tmp_path, limit)]  # as two processes would
    out = np.empty(LAYOUT.chunk_bytes, np.uint8)
    for number in range(40):
        kept[number % 2].put(f"shard{number}", 0, chunk(number), LAYOUT)
        stamp = 10**9 + number * 10**9
        for path in tmp_path.glob("??/*"):
            if path.stat().st_mtime_ns > 10**18:
                os.utime(path, ns=(stamp, stamp))
        if number == 2:
            favourite = next(iter(tmp_path.glob("??/*")))
        assert sum(path.stat().st_blocks * 512 for path in tmp_path.glob("??/*")) <= limit
    assert not favourite.exists()
    assert kept[0].get("shard39", 0, out, LAYOUT) == crc32c(chunk(39))
    assert kept[0].get("shard0", 0, out, LAYOUT) is None
    kept[0].put("large", 0, np.zeros(2 * limit, np.uint8), LAYOUT)
    assert kept[0].held("large", LAYOUT) == set()


def test_reading_a_chunk_makes_it_the_last_to_go(tmp_path):
    kept = DiskChunks(tmp_path, 4 * 2 * 4096)
    out = np.empty(LAYOUT.chunk_bytes, np.uint8)
    for number in range(3):
        kept.put(f"shard{number}", 0, chunk(number), LAYOUT)
    for path in tmp_path.glob("??/*"):
        os.utime(path, ns=(10**9, 10**9))
    assert kept.get("shard1", 0, out, LAYOUT) is not None
    for number in range(3, 5):
        kept.put(f"shard{number}", 0, chunk(number), LAYOUT)
    assert kept.get("shard1", 0, out, LAYOUT) is not None
    assert kept.held("shard0", LAYOUT) | kept.held("shard2", LAYOUT) == set()


def test_a_disk_that_refuses_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "chunks").write_text("not a folder")
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path))
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "1M")
    kept = open_chunks(0)
    kept.put("shard", 0, chunk(0), LAYOUT)
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "0")
    assert isinstance(open_chunks(7), MemoryChunks)

"""FORMAT.md says what is: its tables, its names, its bytes and its queries, against the code."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import featstore
from featstore import claims, index, items, labels, ledger
from featstore.geometry import place, to_input
from featstore.latency import Latency, latency_path
from featstore.plan import FORMAT_VERSION, ExtractPlan
from featstore.sql.runs import CURVE_SCHEMA, METRIC_SCHEMA, RUN_SCHEMA
from featstore.store import ASSIGNMENT_SCHEMA, open_folder, read_attributes
from featstore.tail import NormSpec, RopeSpec, TailSpec, TailWeights, plain_block
from featstore.tail_file import TAIL_FILE, write_tail
from featstore.tombstones import SCHEMA as TOMBSTONE_SCHEMA
from featstore.views import JITTER, MIN_CROP_AREA, check_view
from tests.fakes import fake_plan

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "format1.zarr"
KEY = "15a244a80e89a3dc"
TEXT = (ROOT / "featstore" / "FORMAT.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
# A paragraph, an empty line, and the table that it announces.
TABLE = re.compile(
    r"^((?:[^|\n].*\n)+)\n\| *\w+ *\| *Type *\|.*\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE
)
INTERNAL = {"about", "folded", "sample_lines"}


def tables(section):
    """Give the tables of a section, each as name -> type, in order."""
    return [columns for _, columns in announced(section)]


def announced(section):
    found = []
    for above, lines in TABLE.findall(SECTIONS[section]):
        cells = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines()]
        found.append((above, {line[1].strip("`"): line[2] for line in cells}))
    return found


def columns_of(schema):
    """Give name -> type of an Arrow schema; the name of a list's inner field is nobody's."""
    return {field.name: re.sub(r"list<\w+: ", "list<", str(field.type)) for field in schema}


SCHEMAS = {
    ("Items", 0): items.SCHEMA,
    ("Labels", 0): labels.SCHEMA,
    ("Assignments", 0): ASSIGNMENT_SCHEMA,
    ("Ledger: what is committed", 0): ledger.SCHEMA,
    ("Ledger: what is committed", 1): TOMBSTONE_SCHEMA,
    ("Runs", 0): RUN_SCHEMA,
    ("Runs", 1): METRIC_SCHEMA,
    ("Runs", 2): CURVE_SCHEMA,
}
FILES = {
    ("Items", 0): "items/fake/00000.parquet",
    ("Labels", 0): "labels/fake/depth-00000.parquet",
    ("Assignments", 0): f"feature_sets/{KEY}/assignments/00000.parquet",
    ("Ledger: what is committed", 0): f"feature_sets/{KEY}/ledger/norm/00000.parquet",
}


def test_the_views_are_those_of_the_code():
    paragraph = SECTIONS["Names"].partition("A view is ")[2].partition("\n\n")[0]
    named = re.findall(r"`([a-zA-Z:]+)`", paragraph)
    jitters = ["jitter:SEED:N", "jitter:SEED:N:AMOUNT"]
    assert named == ["plain", "hflip", "crop:SEED:N", *jitters]
    for name in named:
        check_view(name.replace("AMOUNT", "0.25").replace("SEED", "7").replace("N", "0"))
    assert "a quarter" in paragraph
    assert MIN_CROP_AREA == 1 / 4
    assert "a tenth" in paragraph
    assert JITTER == 1 / 10


@pytest.mark.parametrize("place_in_text", SCHEMAS, ids=lambda place: f"{place[0]}-{place[1]}")
def test_the_columns_of_parquet_files_are_those_of_the_code(place_in_text):
    section, number = place_in_text
    documented, real = tables(section)[number], columns_of(SCHEMAS[place_in_text])
    assert list(documented.items()) == list(real.items())


@pytest.mark.parametrize("place_in_text", FILES, ids=lambda place: place[0])
def test_the_columns_are_those_of_a_stored_file(place_in_text):
    section, number = place_in_text
    stored = columns_of(pq.read_schema(GOLDEN / FILES[place_in_text]))
    assert tables(section)[number] == stored


def test_every_table_of_the_text_is_compared_here():
    others = {"Versions", "Feature sets", "Tail", "Writing", "Index"}
    compared = {section for section, _ in SCHEMAS} | others
    assert {section for section in SECTIONS if tables(section)} == compared
    rows = sum(line.startswith("|---") for line in TEXT.splitlines())
    assert rows - 1 == sum(len(tables(section)) for section in SECTIONS)  # but for the names


JSON_TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "list": list,
    "object": dict,
}


@pytest.mark.parametrize(
    ("section", "number", "found"),
    [
        ("Versions", 0, read_attributes(GOLDEN)),
        ("Feature sets", 0, read_attributes(GOLDEN / "feature_sets" / KEY)),
        ("Feature sets", 1, fake_plan().to_json()),
    ],
    ids=["store", "feature set", "plan"],
)
def test_the_attributes_are_those_of_a_store(section, number, found):
    documented = tables(section)[number]
    assert {name: JSON_TYPES[kind] for name, kind in documented.items()} == {
        name: type(value) for name, value in found.items()
    }


def full_tail():
    """Describe a tail that has everything a tail may have."""
    norm = NormSpec()
    block = plain_block(4, 2, qk_norm=norm, attention_norm=norm, mlp_norm=norm, rope="half")
    rope = RopeSpec(n_frequencies=1, reference=(3, 4))
    spec = TailSpec(first=3, blocks=(block,), n_prefix=1, norm=norm, rope=rope)
    return TailWeights(spec=spec, tensors={"norm.weight": np.ones(4, np.float32)})


def test_the_fields_of_a_tail_are_those_of_a_stored_one(store):
    folder = open_folder(store).feature_set(KEY)
    assert (folder.path / TAIL_FILE).exists()
    (entry,) = read_attributes(folder.path)["tail"]
    spec = entry["spec"]
    parts = [entry, spec, spec["blocks"][0], spec["norm"], spec["rope"]]
    for documented, found in zip(tables("Tail"), parts, strict=True):
        assert {name: JSON_TYPES[kind] for name, kind in documented.items()} == {
            name: type(value) for name, value in found.items()
        }


def test_a_claim_is_what_the_text_says(store):
    with claims.Claims(open_folder(store), KEY, purpose="testing") as writer:
        claim = writer.take(3)
        found = json.loads((store / ".locks" / f"{KEY}.claims" / "00003.json").read_text())
    [documented] = tables("Writing")
    assert {name: JSON_TYPES[kind] for name, kind in documented.items()} == {
        name: type(value) for name, value in found.items()
    }
    assert found["nonce"] == claim.nonce
    assert list(found["process"]) == ["host", "machine", "pid", "started"]
    assert f"every {claims.HEARTBEAT_S:.0f} s" in SECTIONS["Writing"]
    assert f"more than {claims.EXPIRY_S:.0f} s" in SECTIONS["Writing"]


def test_the_plan_has_the_fields_of_the_code_and_this_is_the_current_format():
    assert list(tables("Feature sets")[1]) == [field.name for field in fields(ExtractPlan)]
    assert TEXT.startswith(f"# Format {FORMAT_VERSION} ")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Give the golden store with two runs, a tombstone of nothing, targets and a latency in it."""
    path = tmp_path_factory.mktemp("format") / "s.zarr"
    shutil.copytree(GOLDEN, path)
    write_tail(open_folder(path).feature_set(KEY), full_tail())
    for number, (lr, rmse) in enumerate([(0.001, 0.5), (0.01, 0.25)]):
        write_run(path / "runs" / f"deap-depth-20260101-00000{number}-abcd", lr, rmse)
    tombstones = path / "feature_sets" / KEY / "tombstones"
    tombstones.mkdir()
    pq.write_table(TOMBSTONE_SCHEMA.empty_table(), tombstones / "00000.parquet")
    latency_path(path, KEY).write_text('{"latency": []}')
    targets = path / "targets" / "0123456789abcdef"
    targets.mkdir(parents=True)
    (targets / "targets.json").write_text("{}")
    (path / ".removed" / f"{KEY}.1-ab").mkdir(parents=True)
    (path / ".removed" / f"{KEY}.1-ab" / "zarr.json").write_text("{}")
    return path


def test_the_entries_of_a_latency_are_named():
    section = SECTIONS["Runs"]
    named = set(re.findall(r"`(\w+)`", section[section.index("`latency-<key>.json`") :]))
    assert {field.name for field in fields(Latency)} <= named


def write_run(folder, lr, rmse):
    folder.mkdir(parents=True)
    record = {
        **dict.fromkeys(RUN_SCHEMA.names),
        "run_id": folder.name,
        "status": "done",
        "head": "deap.v1",
        "task": "depth.v1",
        "feature_sets": [KEY],
        "options": {"train": {"lr": lr}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    line = {"split": "test", "name": "rmse", "value": rmse, "low": rmse - 0.1, "high": rmse + 0.1}
    pq.write_table(pa.Table.from_pylist([line], METRIC_SCHEMA), folder / "metrics.parquet")
    line = {"step": 1, "split": "train", "name": "loss", "value": 1.0}
    pq.write_table(pa.Table.from_pylist([line], CURVE_SCHEMA), folder / "curves.parquet")


def test_the_tables_of_the_index_are_documented_column_by_column(store):
    documented = {}
    for above, columns in announced("Index"):
        documented[re.match(r"`(\w+)`", above)[1]] = columns
    lines = index.query(
        store,
        """
        select table_name, column_name, data_type
        from information_schema.columns
        where table_catalog = 'store'
        order by table_name, ordinal_position
        """,
    ).to_pylist()
    real = {}
    for line in lines:
        real.setdefault(line["table_name"], {})[line["column_name"]] = line["data_type"]
    assert documented.keys() == real.keys() - INTERNAL
    for name, columns in documented.items():
        assert list(columns.items()) == list(real[name].items()), name


def queries():
    return re.findall(r"^```sql\n(.*?)^```$", SECTIONS["Index"], re.MULTILINE | re.DOTALL)


def test_the_three_example_queries_answer(store):
    stored, left_out, best = (index.query(store, sql).to_pylist() for sql in queries())
    assert [(line["split"], line["n_rows"]) for line in stored] == [("test", 4), ("train", 12)]
    assert {line["path"] for line in left_out} == {"00003.npy"}
    assert len(left_out) == 6  # three taps, two views
    assert all(line["reason"] for line in left_out)
    assert [(line["lr"], line["rmse"]) for line in best] == [("0.01", 0.25), ("0.001", 0.5)]


def tree_patterns():
    """Turn the lines of the tree into patterns of the paths that they allow."""
    block = re.search(
        r"^```\n(features\.zarr/.*?)^```$", SECTIONS["Tree"], re.MULTILINE | re.DOTALL
    )
    holes = {"<array>/": r"(patch|prefix|pooled)/", "<n>": r"\d{5,}", r"*": "[^/]+"}
    patterns = []
    for line in block[1].splitlines()[1:]:
        pattern = re.escape(
            line.split()[0] if not line.startswith("  runs/<run id>") else "runs/<run id>/"
        )
        for hole, meaning in holes.items():
            pattern = pattern.replace(re.escape(hole), meaning)
        pattern = re.sub(r"<[a-z\\ ]+>", "[^/]+", pattern)
        patterns.append(pattern + (".+" if pattern.endswith("/") else ""))
    return patterns


def test_every_file_of_a_store_stands_in_the_tree_and_every_line_of_it_is_used(store):
    index.refresh(store)
    patterns = tree_patterns()
    paths = [file.relative_to(store).as_posix() for file in store.rglob("*") if file.is_file()]
    used = {path: [p for p in patterns if re.fullmatch(p, path)] for path in paths}
    assert [path for path, fitting in used.items() if not fitting] == []
    assert set(patterns) == {pattern for fitting in used.values() for pattern in fitting}


def test_names_are_the_hashes_that_the_text_says():
    def sha256(data):
        return hashlib.sha256(data).hexdigest()

    def canonical(value):
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    (line, *_) = pq.read_table(GOLDEN / FILES["Items", 0]).to_pylist()
    assert line["item"] == sha256(canonical(["fake", line["path"], line["crop"]]))[:16]
    assert sha256(canonical(read_attributes(GOLDEN / "feature_sets" / KEY)["plan"]))[:16] == KEY
    for label in pq.read_table(GOLDEN / FILES["Labels", 0]).to_pylist():
        assert label["digest"] == sha256(label["data"])[:32]


def test_points_map_as_the_text_says():
    for view in ("plain", "hflip"):
        p = place(source_hw=(30, 50), crop=(4, 3, 40, 20), input_hw=(16, 16), resize="letterbox",
                  view=view)  # fmt: skip
        (x0, _, x1, _), (dst_x0, _, dst_x1, _) = p.box, p.dst
        x = dst_x0 + (11.0 - x0) * (dst_x1 - dst_x0) / (x1 - x0)
        if p.is_flipped:
            x = dst_x0 + dst_x1 - x
        assert to_input(p, np.array([[11.0, 9.0]]))[0, 0] == pytest.approx(x)


def test_a_reader_that_knows_only_the_text_reads_the_same_numbers():
    """Everything here is done by the text's words: no code of ours reads the files."""
    folder = GOLDEN / "feature_sets" / KEY
    about = json.loads((folder / "zarr.json").read_text())["attributes"]["featstore"]
    shard_rows, tap = about["shard_rows"], about["taps"]["norm"]
    shape = (tap["grid"][0] * tap["grid"][1], tap["dim"])
    shard = 1
    data = (folder / "norm" / "patch" / "c" / str(shard) / "0" / "0").read_bytes()
    tail = data[-16 * shard_rows - 4 :]
    assert google_crc32c.value(tail[:-4]) == int.from_bytes(tail[-4:], "little")
    places = np.frombuffer(tail[:-4], "<u8").reshape(shard_rows, 2)
    mine = {}
    for line in pq.read_table(folder / "ledger" / "norm" / "00001.parquet").to_pylist():
        offset, size = (int(number) for number in places[line["row"] - shard * shard_rows])
        chunk = data[offset : offset + size]
        assert google_crc32c.value(chunk[:-4]) == int.from_bytes(chunk[-4:], "little")
        assert google_crc32c.value(chunk[:-4]) == line["patch_crc32c"]
        mine[line["row"]] = np.frombuffer(chunk[:-4], "<f2").reshape(shape)
    theirs = featstore.open(GOLDEN).feature_set().read("norm", list(mine))
    assert len(mine) == shard_rows
    np.testing.assert_array_equal(theirs, np.stack(list(mine.values())))

"""Promise 5: ad-hoc SQL cannot change the store, touch other files, or run for ever."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pytest

from featstore import index
from featstore.errors import InvalidInputError
from tests.fakes import FakeReader, content, fake_extract, fake_plan


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sql") / "s.zarr"
    fake_extract(path, [FakeReader(20, bad=[3])])
    index.refresh(path)
    return path


READ = [
    "select 1 as one",
    "  -- why\n select 1; ",
    "with a as (select 1) select * from a",
    "from datasets",
    "table taps",
    "values (1)",
    "describe items",
    "describe select split from samples",
    "summarize metrics",
    "show tables",
    "explain select * from samples",
    "explain analyze select * from samples",
    "/* a */ explain (format json) select 1",
    "select attributes->>'$.a' from items",
]


@pytest.mark.parametrize("sql", READ)
def test_one_statement_that_reads_is_answered(store, sql):
    answer = index.query(store, sql)
    assert isinstance(answer, pa.Table)
    assert answer.num_columns > 0


OTHER_STATEMENTS = [
    "",
    "-- nothing",
    "select 1; select 2",
    "select 1; drop table items",
    "insert into items select * from items",
    "update items set path = ''",
    "delete from items",
    "drop table items",
    "create table x as select 1",
    "create temp table x as select 1",
    "create macro x() as 1",
    "copy items to '{folder}/out.csv'",
    "copy (select 1) to '{folder}/out.parquet' (format parquet)",
    "export database '{folder}/out'",
    "import database '{folder}/out'",
    "attach '{folder}/out.db'",
    "detach store",
    "use memory",
    "set threads = 1",
    "reset threads",
    "set variable a = 1",
    "pragma version",
    "call pragma_version()",
    "install httpfs",
    "load httpfs",
    "create secret (type s3)",
    "prepare a as select 1",
    "begin",
    "checkpoint",
    "vacuum",
    "explain analyze insert into items select * from items",
    "explain copy (select 1) to '{folder}/out.csv'",
    "explain analyze copy (select 1) to '{folder}/out.csv'",
    "explain select 1; drop table items",
]


@pytest.mark.parametrize("sql", OTHER_STATEMENTS)
def test_any_other_statement_is_refused(store, tmp_path, sql):
    with pytest.raises(InvalidInputError, match="Only one select"):
        index.query(store, sql.format(folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


OTHER_FILES = [
    "from read_text('{file}')",
    "from read_blob('{file}')",
    "from read_csv('{file}')",
    "from read_json('{file}')",
    "from sniff_csv('{file}')",
    "from '{file}'",
    "from '{items}'",
    "from read_parquet('{items}')",
    "from parquet_metadata('{items}')",
    "from glob('{folder}/*')",
    "from read_csv('/dev/stdin')",
    "from read_text('https://example.invalid/a')",
    "from query('from read_text(''{file}'')')",
    "from query_table('{file}')",
    "with x as (insert into items from items returning *) from x",
    "from query('create table x as select 1')",
    "from query('insert into items from items')",
    "from a_python_table",
    "from enable_logging()",
    "from enable_profiling()",
    "from duckdb_secrets()",
]


@pytest.mark.parametrize("sql", OTHER_FILES)
def test_a_statement_that_reads_finds_no_other_files(store, tmp_path, sql):
    a_python_table = pa.table({"a": [1]})
    assert a_python_table.num_rows == 1
    file = tmp_path / "secret.csv"  # pytest's folder lies in the system's temporary one
    file.write_text("a,b\n1,2\n")
    items = store / "items/fake/00000.parquet"
    before = content(store)
    with pytest.raises(InvalidInputError) as caught:
        index.query(store, sql.format(file=file, items=items, folder=tmp_path))
    assert "secret.csv" not in str(caught.value).replace(str(file), "")
    assert content(store) == before
    assert list(tmp_path.iterdir()) == [file]


def test_the_spill_folder_leads_nowhere(store, tmp_path):
    # DuckDB lets a query read what lies below the folder that it spills to.
    (tmp_path / "secret.txt").write_text("secret")
    (spill,) = index.query(store, "select current_setting('temp_directory') as p")["p"].to_pylist()
    assert not Path(spill).exists()
    climb = "/".join([".."] * 20)
    for path in (f"{spill}/{climb}{tmp_path}/secret.txt", f"{spill}/../*", f"{tmp_path}/*.txt"):
        with pytest.raises(InvalidInputError, match="Cannot access"):
            index.query(store, f"from read_text('{path}')")


@pytest.mark.parametrize(
    ("sql", "params", "words"),
    [
        ("select splt from samples", None, 'Unknown column "splt". The nearest are "split"'),
        ("from sample", None, 'Did you mean "samples"'),
        ("selct 1", None, "syntax error"),
        ("select $a", None, "parameters: a"),
        ("select 1", {"a": 1}, "a"),
        ("select cast('a' as int)", None, "Could not convert"),
        ("select error('enough')", None, "enough"),
    ],
)
def test_an_error_of_duckdb_is_one_sentence(store, sql, params, words):
    with pytest.raises(InvalidInputError) as caught:
        index.query(store, sql, params)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert "LINE" not in message
    assert " Error: " not in message


def test_parameters_are_values_and_never_sql(store):
    sql = "select count(*) as n from samples where path = $path"
    assert index.query(store, sql, {"path": "00001.npy"})["n"].to_pylist() == [1]
    assert index.query(store, sql, {"path": "' or true --"})["n"].to_pylist() == [0]


@pytest.mark.parametrize(
    "sql",
    [
        "select sum(a.range * b.range) from range(10000000) a, range(10000000) b",
        "with recursive t as (select 1 x union all select x + 1 from t) select count(*) from t",
    ],
)
def test_a_query_without_end_is_stopped(store, sql):
    start = time.perf_counter()
    with pytest.raises(InvalidInputError, match=r"longer than 0.2 s"):
        index.query(store, sql, timeout_s=0.2)
    assert time.perf_counter() - start < 20


WHERE = {
    "split = 'train'": 15,
    "not split = 'train'": 4,
    "split = 'train' or split = 'test'": 19,
    "samples.split = 'train'": 15,
    "row in (1, 2) and crop = ''": 2,
    "list_contains(label_kinds, 'depth')": 19,
    "path like '%--%'": 0,
    "path = 'a; drop table items'": 0,
    "path = ')'": 0,
    "$$a$$ = path": 0,
    "case when split = 'train' then true else false end": 15,
    "len(list_filter([1, 2], lambda x: x > 1)) = 1": 19,
    "true -- and nothing else": 19,
    "/* all */ true": 19,
    "group_id = 'scene1'\n": 2,
}


@pytest.mark.parametrize("where", WHERE)
def test_a_condition_selects_lines(store, where):
    assert index.samples(store, where).num_rows == WHERE[where]


NO_CONDITION = [
    "",
    "  ",
    "-- nothing",
    "true; drop table items",
    "true;",
    "true)",
    "(true",
    "true, true",
    "true as x",
    "and true",
    "a b",
    # out of the parentheses
    "split = 'train') or (split = 'test'",
    "true) -- ",
    "true) /*",
    "true)--\nor (1 = 1",
    "true /* open",
    "'",
    "$$",
    "true\n) order by (row",
    # beyond the condition
    "true order by row",
    "true limit 1",
    "true offset 1",
    "true group by all",
    "true having true",
    "true qualify true",
    "true using sample 1",
    "true window w as ()",
    "true union select * from samples",
    "true union all from samples",
    "true except from samples",
    # other tables
    "exists (select 1)",
    "exists (from items)",
    "row in (select row from rows)",
    "row = any (select row from rows)",
    "(select true)",
    "array(select 1) is null",
    "case when (from items limit 1) is null then true else false end",
    "len(list_filter([1], lambda x: exists (select 1))) = 1",
    "items.item = item",
    "memory.main.x",
    # parameters, stars, aggregates, windows
    "row > $1",
    "row > ?",
    "feature_set = $feature_set",
    "columns(*)",
    "columns('row') > 0",
    "count(*) > 1",
    "row_number() over () > 1",
    # not true or false
    "row",
    "1",
    "'true'",
    "null",
    "split",
    "(split, true)",
    "from_hex('aa')",
    # other errors
    "splt = 'train'",
    "read_text('/etc/hostname') is null",
    "true\x00",
]


@pytest.mark.parametrize("where", NO_CONDITION)
def test_anything_but_one_condition_is_refused(store, where):
    with pytest.raises(InvalidInputError) as caught:
        index.samples(store, where, fake_plan().key())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["error('enough') is null", "path::int > 0"])
def test_a_condition_that_fails_for_a_line_is_one_sentence(store, where):
    with pytest.raises(InvalidInputError, match=r"enough|Could not convert") as caught:
        index.samples(store, where)
    assert "\n" not in str(caught.value)


def test_a_condition_cannot_widen_the_feature_set(store):
    assert index.samples(store, "true or true", feature_set="0" * 16).num_rows == 0
    assert index.samples(store, "false or not false", feature_set="0" * 16).num_rows == 0


def test_an_unknown_column_names_the_nearest(store):
    with pytest.raises(InvalidInputError) as caught:
        index.samples(store, "splt = 'test'")
    said = str(caught.value)
    assert said.startswith('Unknown column "splt". The nearest are "split"')
    assert said.endswith("""Got "splt = 'test'".""")
    with pytest.raises(InvalidInputError, match=r'^Unknown column "splt"') as caught:
        index.query(store, "select splt from samples")
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError, match=r'^Table .*Did you mean "samples"\?$'):
        index.query(store, "select * from sampls")


def test_a_connection_reads_and_nothing_else(store):
    con = index.connect(store)
    try:
        for sql in (
            "insert into items select * from items",
            "create table x as select 1",
            "set enable_external_access = true",
            f"attach '{store}/other.duckdb'",
            f"from read_parquet('{store}/items/fake/00000.parquet')",
        ):
            with pytest.raises(Exception, match=r"read-only|locked|Cannot access|disabled"):
                con.execute(sql)
    finally:
        con.close()

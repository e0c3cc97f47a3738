-- The index. Everything in it is derived from the store's files; FORMAT.md lists the columns.

create table about (
    "schema" varchar not null,  -- hash of this file
    files varchar not null  -- digest of the table `folded`
);

-- Which files are in the index, and how they looked when they were read.
create table folded (path varchar not null, mtime_ns bigint not null, size bigint not null);

create table datasets (
    dataset varchar not null,
    format varchar,
    spec varchar,
    licence varchar,
    homepage varchar
);

create table items (
    dataset varchar not null,
    item varchar not null,
    path varchar,
    splits varchar[],
    label varchar,
    group_id varchar,
    "timestamp" varchar,
    crop varchar,
    image_key varchar,
    height integer,
    width integer,
    file_bytes bigint,
    attributes varchar,
    label_kinds varchar[]
);

create table feature_sets (
    feature_set varchar not null,
    name varchar,
    backbone varchar,
    dtype varchar,
    shard_rows bigint,
    is_foreign boolean,
    plan varchar,
    identity varchar,
    provenance varchar
);

create table taps (
    feature_set varchar not null,
    tap varchar not null,
    dim integer,
    grid_h integer,
    grid_w integer,
    n_prefix integer
);

create table rows (
    feature_set varchar not null,
    assignment integer not null,
    shard integer not null,
    "row" bigint not null,
    image_key varchar,
    crop varchar,
    "view" varchar,
    source_h integer,
    source_w integer,
    input_h integer,
    input_w integer,
    box_x0 double,
    box_y0 double,
    box_x1 double,
    box_y1 double,
    dst_x0 integer,
    dst_y0 integer,
    dst_x1 integer,
    dst_y1 integer,
    is_flipped boolean,
    dataset varchar,
    path varchar
);

create table ledger (
    feature_set varchar not null,
    tap varchar not null,
    shard integer not null,
    "row" bigint not null,
    status varchar,
    reason varchar,
    pixel_hash varchar,
    patch_crc32c uinteger,
    prefix_crc32c uinteger,
    pooled_crc32c uinteger,
    abs_max float,
    mean float,
    std float
);

create table tombstones (
    feature_set varchar not null,
    file varchar not null,
    "row" bigint not null
);

create table runs (
    run_id varchar not null,
    created varchar,
    status varchar,
    head varchar,
    task varchar,
    feature_sets varchar[],
    taps varchar[],
    store varchar,
    parameters bigint,
    dead_parameters bigint,
    steps bigint,
    seconds double,
    device varchar,
    seed bigint,
    best_step bigint
);

create table params (run_id varchar not null, name varchar not null, value varchar);

create table metrics (
    run_id varchar not null,
    split varchar,
    name varchar,
    value double,
    low double,
    high double
);

create table curves (
    run_id varchar not null,
    step bigint,
    split varchar,
    name varchar,
    value double
);

-- A line each assigned row, item and split; those that are stored make the view.
create table sample_lines (
    "row" bigint,
    item varchar,
    dataset varchar,
    split varchar,
    path varchar,
    label varchar,
    image_key varchar,
    height integer,
    width integer,
    crop varchar,
    "view" varchar,
    feature_set varchar,
    group_id varchar,
    "timestamp" varchar,
    attributes varchar,
    label_kinds varchar[],
    is_live boolean not null
);

create view samples as select * exclude (is_live) from sample_lines where is_live;

create view shards as
with assigned as (
    select feature_set, shard, count(*) as n_rows from rows group by feature_set, shard
),
committed as (
    select
        feature_set,
        tap,
        shard,
        count(*) filter (where status = 'ok') as n_ok,
        count(*) filter (where status <> 'ok') as n_rejected
    from ledger
    group by feature_set, tap, shard
)
select
    taps.feature_set,
    taps.tap,
    assigned.shard,
    assigned.n_rows,
    coalesce(committed.n_ok, 0) as n_ok,
    coalesce(committed.n_rejected, 0) as n_rejected,
    committed.shard is not null as is_committed
from taps
inner join assigned using (feature_set)
left join committed
    on taps.feature_set = committed.feature_set
    and taps.tap = committed.tap
    and assigned.shard = committed.shard;

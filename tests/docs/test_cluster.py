"""docs/CLUSTER.md as text: scripts that parse, directives that SLURM has, options that exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from cli.featstore_app import featstore

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "CLUSTER.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(PAGE)
SCRIPTS = [text for language, text in BLOCKS if language == "bash"]
# Of `man sbatch`.
SBATCH = {
    "job-name", "array", "nodes", "ntasks", "cpus-per-task", "gres", "mem", "time", "requeue",
    "output", "dependency", "partition",
}  # fmt: skip
# Of SLURMCluster and its base classes, dask-jobqueue 0.9.
JOBQUEUE = {
    "cores", "processes", "memory", "walltime", "job_extra_directives", "job_script_prologue",
    "worker_extra_args",
}  # fmt: skip


def commands(script):
    """Words of the commands of a script, whatever stands before and behind them."""
    joined = script.replace("\\\n", " ")
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if words and words[0] in ("featstore", "dask"):
            yield [word for word in words if word != "&"]


def check_featstore(words):
    _, name, *args = words
    # What a shell puts in.
    args = [re.sub(r"\$\w+/\$\w+", "3/16", word) for word in args]
    args = [re.sub(r"\$\(.*\)", "host", word) for word in args]
    assert not any("$" in word for word in args), args
    with click.Context(featstore, info_name="featstore") as parent:
        featstore.commands[name].make_context(name, args, parent=parent).close()
    return dict(zip(args[::2], args[1::2], strict=True))


def check_dask(words):
    from distributed.cli import dask_scheduler, dask_ssh, dask_worker

    commands = {"scheduler": dask_scheduler, "ssh": dask_ssh, "worker": dask_worker}
    main = commands[words[1]].main
    known = {option for param in main.params for option in (*param.opts, *param.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known, words


def check(words):
    (check_featstore if words[0] == "featstore" else check_dask)(words)


def test_the_page_has_what_is_checked():
    assert [language for language, _ in BLOCKS].count("bash") == 4
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
    assert sum(len(list(commands(script))) for script in SCRIPTS) == 6


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one_that_bash_reads(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_its_commands_exists(script):
    for words in commands(script):
        check(words)
    for inline in re.findall(r"`(featstore extract --[^`]*)`", PAGE):
        check(shlex.split(inline))


def test_a_wrong_option_would_be_noticed():
    with pytest.raises(click.NoSuchOption):
        check(["featstore", "extract", "--wrokers", "4"])
    with pytest.raises(click.BadParameter, match="no part"):
        check(["featstore", "extract", "--data", "voc:/x", "--shard-range", "17/16"])
    with pytest.raises(AssertionError):
        check(["dask", "worker", "--threads", "4"])


def test_the_job_array_has_the_directives_of_slurm_and_as_many_parts_as_tasks():
    [script] = [text for text in SCRIPTS if "#SBATCH" in text]
    lines = script.splitlines()
    assert lines[0].startswith("#!")
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])
    options = dict(re.fullmatch(r"--([\w-]+)(?:=(\S+))?", line).groups() for line in directives)
    assert set(options) <= SBATCH
    first, last = re.fullmatch(r"(\d+)-(\d+)", options["array"]).groups()
    assert first == "1", "parts are counted from 1"
    assert re.search(rf"^PARTS={last}\b", script, re.MULTILINE)
    assert '"$SLURM_ARRAY_TASK_ID/$PARTS"' in script


def test_the_python_script_gives_what_its_functions_take():
    from featstore.extract import extract
    from featstore.plan import RunOptions

    [script] = [text for language, text in BLOCKS if language == "python"]
    calls = {
        ast.unparse(node.func): {keyword.arg for keyword in node.keywords}
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.Call)
    }
    assert calls["SLURMCluster"] <= JOBQUEUE
    assert calls["featstore.extract"] <= set(extract.__kwdefaults__) | {"data"}
    assert calls["RunOptions"] <= set(RunOptions.__slots__)
    assert 'if __name__ == "__main__":' in script


def test_the_manifests_run_commands_that_exist_on_one_scheduler():
    [text] = [text for language, text in BLOCKS if language == "yaml"]
    found = list(yaml.safe_load_all(text))
    assert [one["kind"] for one in found] == ["Service", "Deployment", "Deployment", "Job"]
    service = found[0]
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    for one in found[1:]:
        pod = one["spec"]["template"]
        [container] = pod["spec"]["containers"]
        check(container["command"])
        if one["metadata"]["name"] != service["metadata"]["name"]:
            assert address in container["command"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
        if one["kind"] == "Deployment":
            assert one["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert service["spec"]["selector"] == found[1]["spec"]["selector"]["matchLabels"]

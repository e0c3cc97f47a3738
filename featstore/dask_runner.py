"""The same shards on a Dask cluster: one future is one shard, one worker does one at a time."""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask.config

from featstore.claims import waiting_message
from featstore.errors import InvalidInputError, NotFoundError
from featstore.local_devices import environments, local_device, n_cores, share_of_threads
from featstore.plan import RunOptions
from featstore.remote.location import find_mirror
from featstore.shard_job import Pace
from featstore.shared_shards import Outcome, ShardTask
from featstore.source_specs import SourceSpec
from featstore.store import FeatureSetFolder, StoreFolder
from featstore.version import __version__
from featstore.worker import MAX_DEATHS, Answer, ClusterJob, work

_CONNECT_S = 30.0
_POLL_S = 0.5
_EVENT_S = 0.5
_ANSWER_S = 5.0
_HEAL_S = 15.0
_LOST_S = 60.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 2.0
_INSTALL = "pip install 'featstore-heads[cluster]'"


class Cluster:
    """The processes of an extraction: local ones, or those of a scheduler that is there already.

    Used in a ``with``, which ends the local ones and leaves the others as they are.
    """

    def __init__(self, options: RunOptions, *, tell: Callable[[str], None]) -> None:
        """Prepare; nothing is started yet.

        Args:
            options: Workers or scheduler, and the device.
            tell: Called with sentences for people.

        Raises:
            InvalidInputError: The library is missing, or the machine has too few GPUs.
        """
        _distributed()
        self._options = options
        self._tell = tell
        self._stack = contextlib.ExitStack()
        self.n_threads: int | None = None  # of a worker to compute with, where it is ours to say
        self.n_loaders = options.n_threads
        self.client: Any = None
        self._local: Any = None
        self._healed_s = 0.0
        self._is_told = False
        self._warm: list[Any] = []

    def __enter__(self) -> Cluster:
        try:
            # What goes wrong is told once, and not by every part of the library too.
            self._stack.enter_context(_quiet())
            self.client = self._connect()
            if not self.n_workers():
                self.client.wait_for_workers(1)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def device(self) -> str:
        """What the workers compute on; where others started them, the first of them is asked."""
        if self._options.scheduler is None:
            return local_device(self._options.device)
        if self._options.device != "auto":
            return self._options.device
        return str(self.client.submit(local_device, "auto", pure=False).result())

    def warm_up(self) -> None:
        """Have the local workers import what takes seconds, while this process does the same."""
        if self._options.scheduler is None:
            for address in self.client.nthreads():
                self._warm.append(
                    self.client.submit(local_device, "auto", pure=False, workers=[address])
                )

    def n_workers(self) -> int:
        """Count the workers that are there, and start local ones anew that did not come back."""
        found = len(self.client.nthreads())
        now_s = time.monotonic()
        if self._local is not None and now_s - self._healed_s > _HEAL_S:
            self._healed_s = now_s
            self._local.scale(self._options.workers)
        if not found and self._local is None and not self._is_told:
            self._is_told = True
            self._tell(f"Waiting for a worker of {self._options.scheduler}.")
        return found

    def _connect(self) -> Any:
        distributed = _distributed()
        address = self._options.scheduler
        if address is None:
            address = self._start(self._options.workers or 1)
        try:
            client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise NotFoundError(
                f"No Dask scheduler answers at {address}. Start one with `dask scheduler`, or "
                "check the address: tcp://HOST:8786."
            ) from error
        return self._stack.enter_context(client)

    def _start(self, n_workers: int) -> Any:
        """Start a process a device on this machine."""
        distributed = _distributed()
        self.n_threads = share_of_threads(n_workers)
        self.n_loaders = self.n_loaders or max(1, n_cores() // n_workers)
        surroundings = environments(n_workers, local_device(self._options.device))
        folder = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="featstore-workers-", ignore_cleanup_errors=True)
        )
        options = {
            "nthreads": 1,  # shards at a time
            "memory_limit": 0,
            "local_directory": folder,
            "silence_logs": logging.CRITICAL,
        }
        workers = {
            number: {"cls": distributed.Nanny, "options": {**options, "env": environment}}
            for number, environment in enumerate(surroundings)
        }
        scheduler = {
            "cls": distributed.Scheduler,
            "options": {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"},
        }
        # A worker that died may take long to come back where it shares its cores.
        patience = {"distributed.deploy.lost-worker-timeout": f"{_LOST_S:.0f}s"}
        self._stack.enter_context(dask.config.set(patience))
        cluster = distributed.SpecCluster(workers=workers, scheduler=scheduler)
        self._local = self._stack.enter_context(cluster)
        return self._local


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise InvalidInputError(
            f"--workers and --scheduler need dask.distributed. Install it: {_INSTALL}."
        ) from error
    return distributed


class DaskCrew:
    """Has the shards done by a cluster; see `shared_shards.Crew`."""

    def __init__(self, cluster: Cluster, spec: SourceSpec) -> None:
        self._cluster = cluster
        self._spec = spec

    def do(
        self,
        folder: FeatureSetFolder,
        tasks: Sequence[ShardTask],
        *,
        pace: Pace,
        on_rows: Callable[[int], None],
        tell: Callable[[str], None],
    ) -> Generator[Outcome, None, None]:
        """See `shared_shards.Crew.do`."""
        path = folder.path.parents[1].absolute()
        mirror = find_mirror(path)
        job = ClusterJob(
            name=secrets.token_hex(8),
            library=__version__,
            store=str(path),
            remote=None if mirror is None else mirror.remote,
            key=folder.key,
            spec=self._spec,
            pace=pace,
            n_threads=self._cluster.n_threads,
            n_loaders=self._cluster.n_loaders,
        )
        board = _Board(self._cluster, job, tasks, on_rows=on_rows, tell=tell)
        try:
            yield from board.run()
        finally:
            board.close()
        if mirror is not None:
            from featstore.remote.mirror import synchronise  # obstore only if it is needed

            synchronise(mirror)  # brings the ledgers of workers with mirrors of their own here


class _Board:
    """The tasks of a job: to do, running, or waited for because another process has them."""

    def __init__(
        self,
        cluster: Cluster,
        job: ClusterJob,
        tasks: Sequence[ShardTask],
        *,
        on_rows: Callable[[int], None],
        tell: Callable[[str], None],
    ) -> None:
        self._cluster, self._client = cluster, cluster.client
        self._job = job
        self._todo = deque(tasks)
        self._later: list[tuple[float, ShardTask]] = []
        self._running: dict[Any, ShardTask] = {}
        self._pauses: dict[int, float] = {}
        self._strikes: Counter[int] = Counter()
        self._counted: Counter[int] = Counter()
        self._committed: set[int] = set()
        self._seen: deque[Mapping[str, int]] = deque()  # this and the next: by the client's threads
        self._ended: queue.Queue[Any] = queue.Queue()
        self._on_rows = on_rows
        self._tell = tell
        self._is_told = False
        self._n_done = 0
        self._topic = f"featstore-{job.name}"
        self._client.subscribe_topic(self._topic, self._on_event)

    def run(self) -> Iterator[Outcome]:
        """Yield outcomes until nothing is left."""
        while self._todo or self._later or self._running:
            self._submit()
            for future in self._finished():
                yield from self._outcome(self._running.pop(future), future)
            self._count_events()

    def close(self) -> None:
        """Take back what is not done."""
        with contextlib.suppress(OSError, TimeoutError):
            self._client.unsubscribe_topic(self._topic)
            self._client.cancel(list(self._running))

    def _submit(self) -> None:
        """Hand out as many shards as there are workers.

        More would be blamed for the death of a worker that has not begun them.
        """
        now = time.monotonic()
        self._todo.extend(task for due, task in self._later if due <= now)
        self._later = [(due, task) for due, task in self._later if due > now]
        try:
            room = max(1, self._cluster.n_workers()) - len(self._running)
        except (OSError, TimeoutError) as error:
            raise _went_away() from error
        while self._todo and room > 0:
            task = self._todo.popleft()
            room -= 1
            future = self._client.submit(_do_shard, self._job, task, self._topic, pure=False)
            self._running[future] = task
            future.add_done_callback(self._ended.put)

    def _finished(self) -> list[Any]:
        """Wait a moment for a shard to end."""
        pause_s = _FIRST_PAUSE_S if self._later else _POLL_S
        with contextlib.suppress(queue.Empty):
            return [self._ended.get(timeout=pause_s)]
        return []

    def _outcome(self, task: ShardTask, future: Any) -> Iterator[Outcome]:
        distributed = _distributed()
        if future.status == "cancelled":
            raise _went_away()
        if future.status == "error":
            error = future.exception()
            if not isinstance(error, distributed.KilledWorker):
                raise error
            yield from self._strike(task)
            return
        answer = self._answer(future) if future.status == "finished" else None
        if answer is None or answer.is_held:
            self._retry(task)
            self._tell_of_waiting(task)
            return
        self._count(task.shard, len(task.lines))
        self._n_done += not answer.set_aside
        yield Outcome(
            task=task,
            # Where the answer was lost with its worker, another one only saw that it is done.
            is_ours=answer.is_ours or task.shard in self._committed,
            rejected=answer.rejected,
            set_aside=answer.set_aside,
        )

    def _answer(self, future: Any) -> Answer | None:
        """Fetch an answer; None if the worker died of the next shard before it gave this one."""
        try:
            answer: Answer = future.result(timeout=_ANSWER_S)
        except TimeoutError:
            return None
        self._count_events()
        return answer

    def _strike(self, task: ShardTask) -> Iterator[Outcome]:
        """Note that workers died before they could claim a shard."""
        self._strikes[task.shard] += 1
        if self._n_done == 0 and self._strikes.total() >= MAX_DEATHS:
            raise InvalidInputError(
                "The workers die before they begin a shard; their own messages say why. Look for "
                "too little memory, or run without --workers to see the error."
            )
        # Dask saw several deaths. With a URL no claim tells the next machine of them.
        if self._strikes[task.shard] < MAX_DEATHS and self._job.remote is None:
            self._retry(task)
            return
        self._count(task.shard, len(task.lines))
        yield Outcome(task=task, set_aside="Workers died again and again when they were given it.")

    def _retry(self, task: ShardTask) -> None:
        pause_s = self._pauses.get(task.shard, _FIRST_PAUSE_S)
        self._pauses[task.shard] = min(2 * pause_s, _LAST_PAUSE_S)
        self._later.append((time.monotonic() + pause_s, task))

    def _tell_of_waiting(self, task: ShardTask) -> None:
        """Say once who has a shard that is waited for for seconds."""
        if self._pauses[task.shard] >= _LAST_PAUSE_S and not self._is_told:
            self._is_told = True
            store, n_waiting = StoreFolder(Path(self._job.store)), len(self._later)
            self._tell(waiting_message(store, self._job.key, task.shard, n_waiting))

    def _on_event(self, event: tuple[float, Mapping[str, int]]) -> None:
        self._seen.append(event[1])

    def _count_events(self) -> None:
        running = {task.shard for task in self._running.values()}
        while self._seen:
            seen = self._seen.popleft()
            if seen.get("committed"):
                self._committed.add(seen["shard"])
            elif seen["shard"] in running:
                self._count(seen["shard"], seen["rows"])

    def _count(self, shard: int, n_rows: int) -> None:
        """Report how many rows of a shard are done in all; fewer than before after a death."""
        change = n_rows - self._counted[shard]
        self._counted[shard] = n_rows
        if change:
            self._on_rows(change)


def _went_away() -> NotFoundError:
    return NotFoundError(
        "The Dask scheduler went away. What was committed is safe; run the same command again to "
        "go on from there."
    )


def _do_shard(job: ClusterJob, task: ShardTask, topic: str) -> Answer:
    """Do one shard in a worker process."""
    worker = _distributed().get_worker()
    n_rows, told_s = 0, time.monotonic()

    def count(n_new: int) -> None:
        nonlocal n_rows, told_s
        n_rows += n_new
        if time.monotonic() - told_s > _EVENT_S:
            told_s = time.monotonic()
            worker.log_event(topic, {"shard": task.shard, "rows": n_rows})

    # Of a worker that others started, its threads are its cores.
    answer = work(job, task, n_cores=worker.state.nthreads, on_rows=count)
    if answer.is_ours and not (answer.is_held or answer.set_aside):
        worker.log_event(topic, {"shard": task.shard, "committed": True})
    return answer

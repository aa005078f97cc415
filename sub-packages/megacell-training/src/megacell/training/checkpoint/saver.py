# SPDX-License-Identifier: Apache-2.0
"""Saves checkpoints while training goes on: copied at once, written in a thread, named when all of it is on disk."""

import json
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megacell.core.errors import DataError
from megacell.core.files import flush_file, hash_file, move_into_place
from megacell.training.checkpoint import checkpoint
from megacell.training.checkpoint.host_copies import HostCopies

FAILURES = (CheckpointException, OSError, RuntimeError)


class Saver:
    """The checkpoints of a run. All its methods are called on all ranks together, from the thread that trains.

    Parameters
    ----------
    folder : Path
        ``RUN/checkpoints``, seen by all ranks.
    network, optimizer
        What is saved.
    keep, best : int
        Checkpoints that stay: the newest, and those of the lowest held-out loss.
    asynchronous : bool, default True
        Write while training goes on; False: ``save`` waits.
    """

    def __init__(
        self, folder: Path, network: Any, optimizer: Any, *, keep: int, best: int = 0, asynchronous: bool = True
    ):
        self.folder, self.keep, self.best, self.asynchronous = folder, keep, best, asynchronous
        self.first = dist.get_rank() == 0
        self._copies = HostCopies(network, optimizer)
        self._copies.take(checkpoint.sharding())  # memory is slow when first written to: not at the first save
        self._request: Any = None  # Megatron's, until all ranks have written
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, facts: dict[str, Any]) -> Path:
        """Save what stands now; returns the folder that it will be, at the latest after ``wait``.

        Parameters
        ----------
        step : int
            Optimizer steps done.
        facts : dict
            For ``checkpoint.json``: what the checkpoint belongs to.

        Raises
        ------
        DataError
            This one, or the one before, could not be written; the checkpoints before it stay as they are.
        """
        self.wait()
        self._target = self.folder / f"step-{step:08d}"
        self._temporary = self.folder / f".{self._target.name}.partial"
        self._facts = {"step": step, **facts}
        if self.first:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
        dist.barrier()
        # Megatron's own queue lives in a process that outlasts a killed rank; writing in this process needs none
        filesystem_async._results_queue = queue.Queue()
        try:
            state = self._copies.take(checkpoint.sharding())
            self._request = dist_checkpointing.save(state, str(self._temporary), async_sharded_save=True)
        except FAILURES as error:
            raise self._not_written() from error
        self._start(self._write)
        if not self.asynchronous:
            self.wait()
        return self._target

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write; once that is so on all ranks, ``commit`` is to be called."""
        return self._request is None or self._thread is None or not self._thread.is_alive()

    def commit(self) -> None:
        """Make a checkpoint of what all ranks have written, if they have not before. DataError as of ``save``."""
        self._check()
        if self._request is None:
            return
        request, self._request = self._request, None
        self._join()
        try:
            for finalize in request.finalize_fns:
                finalize()
        except FAILURES as error:
            raise self._not_written() from error
        if self.first:
            self._start(self._finish)

    def wait(self) -> None:
        """Return when the last checkpoint has its name. DataError as of ``save``."""
        if self._request is not None:
            self._join()
            dist.barrier()
            self.commit()
        self._join()
        dist.barrier()

    def _start(self, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except BaseException as error:  # raised again in the thread that trains
                self._failure = error

        self._thread = threading.Thread(target=run, name=job.__name__, daemon=True)
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise self._not_written() from error

    def _not_written(self) -> DataError:
        if self.first:
            shutil.rmtree(self._temporary, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        return DataError(
            f"{self._target}: could not be written ({free:,} bytes are free); make room, then go on with resume=true"
        )

    def _write(self) -> None:
        """Write this rank's files; what Megatron would do in processes of its own, one a file."""
        self._copies.gather()
        if self._request.async_fn is None:  # this rank has nothing to write
            return
        transforms, *_ = self._request.async_fn.args
        _, buckets, results = self._request.async_fn_args
        done: queue.Queue[tuple[int, Any]] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        answers = {}
        for number, bucket in enumerate(buckets):
            count.put(number)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, local_proc_idx=number, write_bucket=bucket, results_queue=done, count_queue=count,
                use_fsync=True,
            )  # fmt: skip
            _, answers[number] = done.get()
        failed = next((answer for answer in answers.values() if isinstance(answer, Exception)), None)
        results.put(failed or answers)  # Megatron shares a failure out among the ranks

    def _finish(self) -> None:
        """Say in the marker what the checkpoint is, wait until all is on disk, give it its name; remove others."""
        files = {p.name: [p.stat().st_size, hash_file(p)] for p in sorted(self._temporary.iterdir())}
        content = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **self._facts, "files": files}
        (self._temporary / checkpoint.MARKER).write_text(json.dumps(content, indent=1))
        for path in self._temporary.iterdir():
            flush_file(path)
        shutil.rmtree(self._target, ignore_errors=True)
        move_into_place(self._temporary, self._target)
        checkpoint.prune(self.folder, self.keep, self.best)

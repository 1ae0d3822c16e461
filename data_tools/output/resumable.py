"""The output of one run while it grows on disk: token ids, rejects and the journal that confirms both.

A run that ends early, in whatever way, leaves the data confirmed by its journal; the next run of the same command
resumes there. A run that fails before the first line of its journal leaves nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_tools.encoding.encode import EncodedChunk, add_dropped
from data_tools.output.duplicates import RawDocuments, copy_unique
from data_tools.output.journal import Journal, RunState, differences
from data_tools.output.run_lock import RunLock
from data_tools.readers import LineNumbers, Reject
from data_tools.stop_signals import StoppedError, StopSignals
from pretrain.data.dataset.dataset_writer import (
    IndexedDatasetWriter,
    WriterState,
    can_resume,
    explain_os_errors,
    remove_temporaries,
)
from pretrain.data.dataset.manifest import Dropped, Manifest
from pretrain.errors import DataError

_COMMIT_BYTES = 64 << 20
_MIN_COMMIT_SECONDS = 1.0


class ResumableRun:
    """One run on the prefix `prefix`; use it as a context manager.

    Attributes:
        state: the progress of the run.
        start: the first chunk to process, None for the first of all.
        published: the manifest if an earlier run had finished everything except the cleanup, so no work is left.
    """

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype,
        header: Mapping[str, Any],
        *,
        overwrite: bool = False,
        restart: bool = False,
        is_raw: bool = False,
        commit_seconds: float | None = 5.0,
    ) -> None:
        """`header` describes the run in JSON types. With `is_raw` the tokens are collected beside the dataset, for a
        second pass. `commit_seconds`: between two lines of the journal; None for a run that cannot be resumed."""
        self._prefix, self._dtype, self._header = prefix, dtype, json.loads(json.dumps(header))
        self._overwrite, self._restart, self._commit_seconds = overwrite, restart, commit_seconds
        self._tokens_prefix = f"{prefix}.raw" if is_raw else prefix
        self._rejects_path = Path(f"{prefix}.rejects.jsonl.tmp")
        self._stack = ExitStack()
        self._line_numbers = LineNumbers()
        self._last_commit, self._last_bytes = time.monotonic(), 0
        self.state = RunState()
        self.start: tuple[int, int] | None = None
        self.published: Manifest | None = None

    def __enter__(self) -> ResumableRun:
        """Takes the lock and loads the state of an unfinished run.

        Raises:
            DataError: another run is in progress, the unfinished run has other settings, or the dataset exists.
        """
        with ExitStack() as stack:
            stack.enter_context(RunLock(self._prefix))
            self._journal = self._find_journal()
            if self.published is not None:
                stack.callback(self._tidy_up)
            else:
                IndexedDatasetWriter(self._prefix, self._dtype, overwrite=self._overwrite)  # refuses existing files
                self.writer = self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.published is None:
            if error is not None and self._keep(error):
                self.writer.keep()
            else:
                self._stack.callback(self._tidy_up)
        self._stack.__exit__(kind, error, trace)

    @property
    def rejects_path(self) -> Path:
        """The file of the rejects until the dataset is published."""
        return self._rejects_path

    def append(self, chunk: EncodedChunk, disk_bytes: int) -> None:
        """Adds the result of one chunk, and flushes everything to disk from time to time.

        `disk_bytes`: how much of the input has been read so far.

        Raises:
            DataError: the disk is full.
        """
        self.writer.add_documents(chunk.tokens, chunk.lengths, chunk.sequences)
        dropped = dict(self.state.dropped)
        add_dropped(dropped, chunk.dropped)
        rejects = self._line_numbers.locate(chunk.rejects, chunk.lines)
        with explain_os_errors(self._rejects_path):
            for reject in rejects:
                add_dropped(dropped, {reject.reason: Dropped(documents=1)})
                self._rejects.write(_line(reject))
        self.state = replace(
            self.state,
            next_chunk=(chunk.source, chunk.number + 1),
            dropped=dropped,
            text_bytes=self.state.text_bytes + chunk.text_bytes,
            disk_bytes=disk_bytes,
            rejects=self.state.rejects + len(rejects),
            replaced=self.state.replaced + chunk.replaced,
        )
        self._commit_if_due()

    def commit(self, *, is_complete: bool = False, published: str = "") -> None:
        """Flushes everything to disk and records it in the journal. Raises DataError: the disk is full."""
        if self._commit_seconds is None:
            return
        writer = self.writer.checkpoint()
        with explain_os_errors(self._journal.path):
            self._rejects.flush()
            os.fsync(self._rejects.fileno())
            self.state = replace(
                self.state,
                writer=writer,
                reject_bytes=self._rejects.tell(),
                is_complete=is_complete or self.state.is_complete,
                published=published,
            )
            self._journal.append(self.state)
        self._last_commit, self._last_bytes = time.monotonic(), self.writer.num_bytes

    @contextmanager
    def final_writer(self, memory: int, threads: int) -> Iterator[tuple[IndexedDatasetWriter, dict[str, Dropped]]]:
        """The writer that holds the dataset, and what was left out; for a raw run, after its second pass.

        `memory` and `threads` as in `copy_unique`.
        """
        if self._tokens_prefix == self._prefix:
            yield self.writer, self.state.dropped
            return
        self.writer.checkpoint()
        raw = RawDocuments.open(self._tokens_prefix, self._dtype)
        with (
            StopSignals() as stop,
            IndexedDatasetWriter(self._prefix, self._dtype, overwrite=self._overwrite) as writer,
        ):
            left_out = copy_unique(raw, writer, memory=memory, threads=threads, check_stop=stop.check)
            dropped = dict(self.state.dropped)
            if left_out.documents:
                add_dropped(dropped, {"duplicate": left_out})
            yield writer, dropped

    def publish_rejects(self) -> None:
        """Publishes PREFIX.rejects.jsonl, or removes that of an older dataset. Raises OSError."""
        final = Path(f"{self._prefix}.rejects.jsonl")
        self._rejects.flush()
        os.fsync(self._rejects.fileno())
        if self.state.rejects:
            self._rejects_path.replace(final)
        else:
            final.unlink(missing_ok=True)

    def announce(self, manifest: Manifest) -> None:
        """Records in the journal which dataset is about to be published."""
        self.commit(is_complete=True, published=_fingerprint(manifest))

    def _find_journal(self) -> Journal:
        path = Path(f"{self._prefix}.journal")
        journal = None if self._restart or self._commit_seconds is None else Journal.load(path)
        if journal is None:
            if path.exists() and not self._restart:
                _warn(f"{path} cannot be used; starting over")
            return Journal(path, self._header)
        changes = differences(_comparable(journal.header, self._header), self._header)
        if changes:
            raise DataError(
                f"{path}: an unfinished run was started with other settings ({_shorten(changes)}); give the same ones "
                "to continue it, or --restart to start over"
            )
        for state in journal.states:
            if self._is_published(state):
                self.published = Manifest.load(Path(f"{self._prefix}.json"))
                self.state = state
                return journal
            if self._take_back(state):
                journal.go_back_to(state)
                journal.header = self._header
                self.state, self.start = state, state.next_chunk
                return journal
        _warn(f"{path}: the files of the unfinished run do not match it; starting over")
        return Journal(path, self._header)

    def _is_published(self, state: RunState) -> bool:
        path = Path(f"{self._prefix}.json")
        if not state.published or not path.exists():
            return False
        with suppress(DataError):
            return _fingerprint(Manifest.load(path)) == state.published
        return False

    def _take_back(self, state: RunState) -> bool:
        """Whether the temporary files hold `state`; first renames files published without PREFIX.json back."""
        moved = []
        if state.published and not Path(f"{self._prefix}.json").exists():
            pairs = [(Path(f"{self._prefix}.rejects.jsonl"), self._rejects_path)]
            if self._tokens_prefix == self._prefix:
                pairs.append((Path(f"{self._prefix}.bin"), Path(f"{self._prefix}.bin.tmp")))
            moved = [(final, temporary) for final, temporary in pairs if final.exists() and not temporary.exists()]
        for final, temporary in moved:
            final.rename(temporary)
        rejects_bytes = self._rejects_path.stat().st_size if self._rejects_path.exists() else 0
        is_good = rejects_bytes >= state.reject_bytes and can_resume(self._tokens_prefix, self._dtype, state.writer)
        if is_good:
            if moved:
                Path(f"{self._prefix}.idx").unlink(missing_ok=True)
        else:
            for final, temporary in moved:
                temporary.rename(final)
        return is_good

    def _open(self, stack: ExitStack) -> IndexedDatasetWriter:
        """Opens the writer and the spool of rejects, both truncated to the state."""
        is_resumed = self.start is not None
        if not is_resumed:
            self._journal.path.unlink(missing_ok=True)
            for prefix in (self._prefix, f"{self._prefix}.raw"):
                remove_temporaries(prefix)
        with explain_os_errors(self._rejects_path):
            # An empty spool may have been removed meanwhile.
            is_there = is_resumed and self._rejects_path.exists()
            spool = self._rejects_path.open("r+b") if is_there else self._rejects_path.open("w+b")
            self._rejects: BinaryIO = stack.enter_context(spool)
            self._rejects.truncate(self.state.reject_bytes)
            self._rejects.seek(self.state.reject_bytes)
        state: WriterState | None = self.state.writer if is_resumed else None
        writer = IndexedDatasetWriter(self._tokens_prefix, self._dtype, overwrite=True, state=state)
        return stack.enter_context(writer)

    def _commit_if_due(self) -> None:
        if self._commit_seconds is None:
            return
        seconds, num_bytes = time.monotonic() - self._last_commit, self.writer.num_bytes - self._last_bytes
        least = min(_MIN_COMMIT_SECONDS, self._commit_seconds)
        if seconds >= self._commit_seconds or (num_bytes >= _COMMIT_BYTES and seconds >= least):
            self.commit()

    def _keep(self, error: BaseException) -> bool:
        """Whether there is something to keep after `error`; prints how to resume."""
        if isinstance(error, StoppedError | KeyboardInterrupt):
            with suppress(DataError):  # a full disk: the last line of the journal stays valid
                self.commit()
        if not self._journal.path.exists():
            return False
        _note(f"what is done is kept in {self._journal.path}: the same command continues, --restart starts over")
        return True

    def _tidy_up(self) -> None:
        self._rejects_path.unlink(missing_ok=True)
        for prefix in {self._tokens_prefix, self._prefix}:
            remove_temporaries(prefix)
        self._journal.remove()


def _comparable(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old header, without a difference that cannot affect finished work.

    A run that stops at errors has met none, so it may be resumed with another --on-error.
    """
    reading = old.get("reading", {})
    if reading.get("on_error") != "stop" or "reading" not in new:
        return old
    return {**old, "reading": {**reading, "on_error": new["reading"]["on_error"]}}


def _shorten(changes: list[str]) -> str:
    """The first differences, shortened, and how many more there are."""
    shown = [change if len(change) <= 200 else f"{change[:197]}..." for change in changes[:4]]
    more = [f"and {len(changes) - len(shown)} more"] if len(changes) > len(shown) else []
    return "; ".join(shown + more)


def _fingerprint(manifest: Manifest) -> str:
    return xxhash.xxh64(" ".join([*manifest.bin_xxh64, manifest.idx_xxh64]).encode()).hexdigest()


def _line(reject: Reject) -> bytes:
    fields = {key: value for key, value in asdict(reject).items() if key != "is_row"}
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr, flush=True)


def _note(words: str) -> None:
    print(words, file=sys.stderr, flush=True)

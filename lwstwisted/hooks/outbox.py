"""What is to be told, on disk until somebody has taken it.

Facts
    * An upload is finished when its file has its name. To give the name and to note that this has to be told are two
      steps, and a crash may come between any two steps.
    * What was told and what was noted as told are two steps as well.

Decision
    First it is noted what is about to happen, durably, together with its *proof*: how to see that it has. Then it
    happens. Then the note is *confirmed*, and may be told. Who finds a note whose writer is dead looks at the proof and
    confirms it or forgets it; so does the writer itself, if anything went wrong. So nothing that is finished goes
    untold, and what was never finished isn't told of. The proof of a file is its entity-tag under its name, which no
    other file ever has.

    It is told, then noted as told: what a crash comes between is told twice. Everything is told *at least once*. What
    is told of one upload is told in the order in which it was noted.

    SQLite keeps the notes: journal mode WAL, and ``synchronous=FULL``, so that a transaction is on disk when it ends.
    Confirmations need not be, and are gathered: after a crash the proof says the same again.

    Processes that share the root share the notes. Each tells its own; those of a dead one go to whoever sees it first.
    A process lives as long as it locks its byte of the file ``owners`` (an open file description lock, as in
    ``stores/locks.py``): no clock decides who is dead.

Price
    * One more sync for each upload, before it gets its name.
    * A file that was replaced or deleted after a crash, and before somebody has looked, is taken for one that never
      was. Its client had no answer.
    * The file system has to have locks, and memory that is shared between processes: none over a network.

Roads not taken
    * The files themselves as the list of what was told, by an attribute: not each file system has attributes.
    * Leases that run out: a clock that is set, or a machine that sleeps, would have two processes tell.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from lwstwisted.interfaces import Name
from lwstwisted.stores.locks import lock_byte, open_shared
from lwstwisted.stores.names import STATE_FOLDER
from lwstwisted.stores.tree import found_of

FOLDER = "hooks"
"""Of the store's own folder: where all this is."""

BUSY = 10.0
"""Seconds to wait for another process that writes; it may be waiting for a slow disk."""

_OPENING = 0
"""The byte of ``owners`` that is locked by who opens the notes; all others are of processes."""

_TABLE = """
CREATE TABLE IF NOT EXISTS note (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL,
    upload TEXT NOT NULL,
    hook TEXT NOT NULL,
    message TEXT NOT NULL,
    proof TEXT,
    tries INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS by_upload ON note (upload, id);
CREATE INDEX IF NOT EXISTS by_owner ON note (owner, tries > 0, id);
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """How to see that a file has got its name."""

    name: Name
    etag: str

    def holds(self, root: Path) -> bool:
        """Look. It blocks."""
        try:
            return found_of(os.lstat(root.joinpath(*self.name))).etag == self.etag
        except (FileNotFoundError, NotADirectoryError):
            return False


@dataclass(frozen=True, slots=True)
class Note:
    """Something to tell.

    :ivar upload: its id; what has the same one keeps its order.
    :ivar hook: the name of the event.
    :ivar proof: None for what has happened.
    """

    upload: str
    hook: str
    message: str
    proof: Proof | None = None


@dataclass(frozen=True, slots=True)
class Due:
    """A note that may be told now.

    :ivar id: of the note.
    :ivar tries: how often that has failed.
    """

    id: int
    upload: str
    hook: str
    message: str
    tries: int


class Outbox:
    """The notes of a root. Every method blocks, and may be called by any thread.

    :param root: of the store.
    :param longest: seconds from a failure to the next try, at most: what is due later than that was noted by a clock
        that has been set back.
    :raises OSError: if it can't be opened.
    """

    def __init__(self, root: Path, longest: float) -> None:
        self._root = root
        self._longest = longest
        self._entered = Lock()
        self._owner = secrets.randbits(62) + 1
        self._owners = -1
        folder = root / STATE_FOLDER / FOLDER
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._owners = open_shared(b"owners", descriptor)
            os.close(open_shared(b"outbox.db", descriptor))  # which SQLite would make readable for others
            lock_byte(self._owners, self._owner, wait=False)
            lock_byte(self._owners, _OPENING)
            try:
                with _told():
                    self._open(folder / "outbox.db")
            finally:
                lock_byte(self._owners, _OPENING, fcntl.F_UNLCK)
            os.fsync(descriptor)
            _sync(folder.parent)
        except BaseException:
            self._give_up()
            raise
        finally:
            os.close(descriptor)

    def _open(self, path: Path) -> None:
        self._base = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        self._base.execute("PRAGMA journal_mode=WAL")
        self._base.execute("PRAGMA synchronous=FULL")
        self._base.executescript(_TABLE)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        with self._entered, _told():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    # Before and after what is told of

    def put(self, notes: Sequence[Note]) -> list[int]:
        """Note things, durably, and all or none.

        :returns: their ids.
        """
        with self._writing() as base:
            return [self._insert(base, note) for note in notes]

    def _insert(self, base: sqlite3.Connection, note: Note) -> int:
        proof = note.proof and json.dumps([note.proof.name, note.proof.etag])
        cursor = base.execute(
            "INSERT INTO note (owner, upload, hook, message, proof) VALUES (?, ?, ?, ?, ?)",
            (self._owner, note.upload, note.hook, note.message, proof),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def settle(self, confirmed: Collection[int], doubtful: Collection[int]) -> None:
        """Note which things have happened, and look at the proofs of others."""
        with self._writing() as base:
            self._confirm(base, confirmed)
            for id in doubtful:
                self._judge(base, base.execute("SELECT id, proof FROM note WHERE id = ?", (id,)).fetchall())

    def _confirm(self, base: sqlite3.Connection, ids: Collection[int]) -> None:
        base.executemany("UPDATE note SET proof = NULL WHERE id = ?", [(id,) for id in ids])

    def _judge(self, base: sqlite3.Connection, notes: Collection[tuple[int, str]]) -> None:
        for id, proof in notes:
            name, etag = json.loads(proof)
            if Proof(tuple(name), etag).holds(self._root):
                self._confirm(base, (id,))
            else:
                base.execute("DELETE FROM note WHERE id = ?", (id,))

    def adopt(self, judges: bool) -> int:
        """Take over what dead processes have left; how many notes that is.

        :param judges: whether to look at proofs. That is for a start: before it, files of a form may have their names
            that will be taken back (``stores/batch.py``).
        """
        with self._entered, _told():
            found = self._base.execute("SELECT DISTINCT owner FROM note WHERE owner != ?", (self._owner,)).fetchall()
        return sum(self._adopt_from(owner, judges) for (owner,) in found)

    def _adopt_from(self, owner: int, judges: bool) -> int:
        try:
            lock_byte(self._owners, owner, wait=False)
        except BlockingIOError:
            return 0  # it lives
        try:
            with self._writing() as base:
                query = "SELECT id, proof FROM note WHERE owner = ? AND proof IS NOT NULL"
                if judges:
                    self._judge(base, base.execute(query, (owner,)).fetchall())
                update = "UPDATE note SET owner = ? WHERE owner = ? AND proof IS NULL"
                return base.execute(update, (self._owner, owner)).rowcount
        finally:
            lock_byte(self._owners, owner, fcntl.F_UNLCK)

    # For who tells

    def due(self, now: float, count: int, without: Collection[int]) -> list[Due]:
        """What may be told now: for each upload the first note only, whoever has to tell that.

        :param count: how many notes at most.
        :param without: what is being told.
        """
        with self._entered, _told():
            found = self._base.execute(
                "SELECT id, upload, hook, message, tries FROM note WHERE owner = ? AND proof IS NULL"
                " AND (due <= ? OR due > ?) AND id NOT IN (SELECT value FROM json_each(?))"
                " AND NOT EXISTS (SELECT 1 FROM note AS earlier WHERE earlier.upload = note.upload"
                "  AND earlier.id < note.id) ORDER BY tries > 0, id LIMIT ?",
                (self._owner, now, now + self._longest, json.dumps(list(without)), count),
            ).fetchall()
        return [Due(*row) for row in found]

    def taken(self, id: int) -> None:
        """Forget what was told."""
        with self._writing() as base:
            base.execute("DELETE FROM note WHERE id = ?", (id,))

    def put_off(self, id: int, due: float) -> None:
        """Note that telling it has failed.

        :param due: when to try again.
        """
        with self._writing() as base:
            base.execute("UPDATE note SET tries = tries + 1, due = ? WHERE id = ?", (due, id))

    def count(self) -> int:
        """How many notes there are, of all processes."""
        with self._entered, _told():
            found: int = self._base.execute("SELECT count(*) FROM note").fetchone()[0]
            return found

    def close(self) -> None:
        """Give everything back; may be repeated. What isn't settled is settled by who opens it next."""
        with self._entered:
            self._give_up()

    def _give_up(self) -> None:
        if (base := getattr(self, "_base", None)) is not None:
            base.close()
        owners, self._owners = self._owners, -1
        if owners >= 0:
            os.close(owners)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _told() -> Iterator[None]:
    """Failures of SQLite as those of the disk that they are."""
    try:
        yield
    except sqlite3.Error as error:
        is_full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        raise OSError(errno.ENOSPC if is_full else errno.EIO, f"the notes of hooks: {error}") from error



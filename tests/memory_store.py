"""A store in memory, for tests that want speed, or a store that fails or waits where they say.

It keeps the same promises as the one on disk (``contracts.py``), but for a crash: of what isn't durable nothing is ever
there again. Several stores on one :class:`Disk` are the processes that share a root.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lwstwisted import errors
from lwstwisted.errors import Refused
from lwstwisted.interfaces import (
    NO_DIGESTS,
    Announce,
    Check,
    Digests,
    Entry,
    Found,
    Name,
    Named,
    UploadState,
    anything,
    unannounced,
)


async def at_once(call: str) -> None:
    """Every call goes on."""


def _digest(name: str, data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big") if name == "crc32" else hashlib.new(name, data).digest()


def _are(digests: Digests, data: bytes) -> bool:
    return all(digest in (None, _digest(name, data)) for name, digest in digests.items())


@dataclass
class Kept:
    """An upload on a :class:`Disk`: what is durable of it, and who holds it."""

    record: Mapping[str, Any]
    length: int | None
    lifetime: float
    changed: float
    data: bytes = b""
    named: Named | None = None
    size: int = 0
    holder: MemoryUpload | None = None
    is_wanted: bool = False

    @property
    def state(self) -> UploadState:
        """As the interface has it."""
        offset = len(self.data) if self.named is None else self.size
        return UploadState(offset, self.length, self.record, self.changed + self.lifetime, self.named)

    @property
    def taken(self) -> int:
        """Bytes that it takes, or will."""
        if self.named is not None:
            return 0
        return self.length if self.length is not None else len(self.holder.data if self.holder else self.data)


@dataclass
class Disk:
    """What stores share.

    :ivar files: by name; contents and what is known of them.
    :ivar folders: that were made for them.
    :ivar uploads: by id.
    """

    files: dict[Name, tuple[bytes, Found]] = field(default_factory=dict)
    folders: set[Name] = field(default_factory=set)
    uploads: dict[str, Kept] = field(default_factory=dict)
    etags: itertools.count[int] = field(default_factory=itertools.count)

    def found(self, name: Name) -> Found | None:
        """The file of a name."""
        return self.files[name][1] if name in self.files else None

    def require_target(self, name: Name) -> None:
        """Refuse what no file can be."""
        if any(name[:depth] in self.files for depth in range(1, len(name))):
            raise Refused(errors.NOT_A_FOLDER)
        if not name or name in self.folders:
            raise Refused(errors.IS_FOLDER)

    def put(self, name: Name, data: bytes, check: Check, digests: Digests) -> Named:
        """Make a file."""
        self.require_target(name)
        check(self.found(name))
        is_new = name not in self.files
        etag = f'"{next(self.etags)}"'
        kept = {algorithm: _digest(algorithm, data) for algorithm in digests if algorithm != "md5"}
        self.files[name] = (data, Found(etag, len(data), time.time(), kept))
        self.folders.update(name[:depth] for depth in range(1, len(name)))
        return Named(is_new, etag)

    def used(self) -> int:
        """Bytes that count against a quota."""
        return sum(len(data) for data, _ in self.files.values()) + sum(one.taken for one in self.uploads.values())


def _checked(name: Name) -> Name:
    if name[:1] == (".lwstwisted",) or any(part in ("", ".", "..") or "/" in part for part in name):
        raise ValueError(f"unchecked name: {name!r}")
    return name


class MemoryPartial:
    """A ``PartialFile``."""

    def __init__(self, store: MemoryStore, name: Name, check: Check, digests: Digests) -> None:
        self.etag = ""
        self.name = name
        self.check = check
        self.digests: dict[str, bytes] = {}
        self.expected = digests
        self.data = b""
        self.is_over = False
        self.batch: MemoryBatch | None = None
        self._store = store

    async def append(self, data: memoryview) -> None:
        await self._store.before("append")
        if self.is_over:
            raise Refused(errors.STORE_FAILED)
        try:
            self._store.require_room(len(data))
        except BaseException:
            self.is_over = True
            raise
        self.data += data

    async def commit(self, data: memoryview) -> bool:
        await self._store.before("commit")
        if self.is_over:
            raise Refused(errors.STORE_FAILED)
        self.is_over = True
        self._store.require_room(len(data))
        self.data += data
        if not _are(self.expected, self.data):
            raise Refused(errors.DIGEST_MISMATCH)
        self.digests = {name: _digest(name, self.data) for name in self.expected}
        if self.batch is not None:
            self.batch.keep(self)
            return True
        named = self._store.disk.put(self.name, self.data, self.check, self.expected)
        self.etag = named.etag
        return named.created

    async def discard(self) -> None:
        self.is_over = True


class MemoryBatch:
    """A ``Batch``."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._parts: list[MemoryPartial] = []
        self._is_over = False

    async def reserve(self, length: int) -> None:
        await self._store.before("reserve")
        self._store.require_room(length)

    async def create(
        self, name: Name, length: int | None, check: Check = anything, digests: Digests = NO_DIGESTS
    ) -> MemoryPartial:
        part = await self._store.create(name, length, check, digests)
        part.batch, part.is_over = self, self._is_over
        return part

    def keep(self, part: MemoryPartial) -> None:
        if part.name in [other.name for other in self._parts]:
            raise ValueError("two files of one name in a batch")
        self._parts.append(part)

    async def commit(self) -> list[bool]:
        await self._store.before("commit")
        disk, parts = self._store.disk, self._parts
        await self.discard()
        for part in parts:
            disk.require_target(part.name)
            part.check(disk.found(part.name))
        named = [disk.put(part.name, part.data, anything, part.expected) for part in parts]
        for part, one in zip(parts, named, strict=True):
            part.etag = one.etag
        return [one.created for one in named]

    async def discard(self) -> None:
        self._parts, self._is_over = [], True


class MemoryUpload:
    """A ``StoredUpload``.

    :ivar data: all bytes that were appended, durable or not.
    """

    def __init__(self, store: MemoryStore, id: str, kept: Kept) -> None:
        self.id = id
        self.data = kept.data
        self.digests: dict[str, bytes] = {}
        self._store = store
        self._kept = kept
        kept.holder, kept.is_wanted = self, False

    @property
    def state(self) -> UploadState:
        return self._kept.state

    @property
    def etag(self) -> str:
        return "" if self._kept.named is None else self._kept.named.etag

    def _require_open(self) -> None:
        if self._kept.holder is not self or self._kept.named is not None:
            raise Refused(errors.STORE_FAILED)

    async def append(self, data: memoryview) -> None:
        await self._store.before("append")
        self._append(bytes(data))

    def _append(self, data: bytes) -> None:
        self._require_open()
        if self._kept.length is None:
            self._store.require_room(len(data))
        elif len(self.data) + len(data) > self._kept.length:
            raise Refused(errors.UPLOAD_OVERRUN)
        self.data += data

    async def commit(self, data: memoryview) -> bool:
        await self.append(data)
        await self.checkpoint()
        return True

    async def checkpoint(self) -> None:
        data = self.data
        await self._store.before("sync")
        self._require_open()
        if data != self._kept.data:
            self._kept.data, self._kept.changed = data, time.time()

    async def verify(self, digests: Mapping[str, bytes], begin: int | None = None) -> bool:
        await self._store.before("verify")
        self._require_open()
        return _are(digests, self.data[len(self._kept.data) if begin is None else begin :])

    async def discard(self) -> None:
        self.data = self._kept.data

    async def keep(self, record: Mapping[str, Any], length: int | None) -> None:
        await self._store.before("keep")
        had = self._kept.length
        if length != had and (had is not None or length is None or length < len(self.data)):
            raise Refused(errors.LENGTH_MISMATCH)
        if had is None and length is not None:
            self._store.require_room(length - len(self.data))
        self._kept.record, self._kept.length, self._kept.changed = record, length, time.time()

    async def take_from(self, other: MemoryUpload) -> None:
        await self._store.before("take_from")
        other._require_open()
        self._append(other._kept.data)

    async def name_it(
        self,
        name: Name,
        check: Check = anything,
        digests: Digests = NO_DIGESTS,
        announce: Announce = unannounced,
    ) -> Named:
        await self._store.before("name_it")
        if self._kept.named is not None:
            return self._kept.named
        self._require_open()
        try:
            if not _are(digests, self.data):
                raise Refused(errors.DIGEST_MISMATCH)
            self.digests = {name: _digest(name, self.data) for name in digests}
            named = self._store.disk.put(_checked(name), self.data, check, digests)
        except Refused:
            await self.checkpoint()
            raise
        if self._kept.length is None:
            self._kept.length = len(self.data)
        self._kept.size, self._kept.named, self._kept.changed = len(self.data), named, time.time()
        self.data = self._kept.data = b""
        return named

    async def remove(self) -> None:
        await self._store.before("remove")
        if self._kept.holder is not self:
            raise Refused(errors.STORE_FAILED)
        del self._store.disk.uploads[self.id]
        self._kept.holder = None

    def is_wanted(self) -> bool:
        return self._kept.holder is self and self._kept.is_wanted

    async def release(self) -> None:
        self.let_go()

    def hurry(self) -> None:
        pass

    def hand_over(self) -> MemoryUpload | None:
        if self._kept.holder is not self or self.data != self._kept.data or self.is_wanted():
            return None
        return MemoryUpload(self._store, self.id, self._kept)

    def let_go(self) -> None:
        """Let others have it."""
        if self._kept.holder is self:
            self._kept.holder = None


class MemoryStore:
    """A ``ResumableStore``.

    :param before: awaited in front of each step, which it names, and which it may refuse: ``append``, ``sync``,
        ``verify``, ``keep``, ``take_from``, ``name_it``, ``remove``, ``begin``, ``open``, ``look`` and others.
    """

    failure: OSError | None = None

    def __init__(
        self,
        disk: Disk | None = None,
        *,
        quota: int | None = None,
        before: Callable[[str], Awaitable[None]] = at_once,
    ) -> None:
        self.disk = Disk() if disk is None else disk
        self.hook = before
        self._quota = quota
        self._is_stopped = False
        self._described: dict[int, Found] = {}

    async def before(self, call: str) -> None:
        """Go on with a step, unless the store is stopping, or the test says otherwise."""
        if self._is_stopped:
            raise Refused(errors.STOPPING)
        await self.hook(call)

    def require_room(self, count: int) -> None:
        """Refuse what is more than the quota."""
        if self._quota is not None and count > self._quota:
            raise Refused(errors.BODY_TOO_LARGE)
        if self._quota is not None and count > 0 and self.disk.used() + count > self._quota:
            raise Refused(errors.QUOTA_EXCEEDED)

    # Files

    async def create(
        self,
        name: Name,
        length: int | None,
        check: Check = anything,
        digests: Digests = NO_DIGESTS,
        announce: Announce = unannounced,
    ) -> MemoryPartial:
        _checked(name)
        await self.before("create")
        self.disk.require_target(name)
        check(self.disk.found(name))
        self.require_room(length or 0)
        return MemoryPartial(self, name, check, digests)

    def batch(self) -> MemoryBatch:
        return MemoryBatch(self)

    def _require_file(self, name: Name) -> tuple[bytes, Found]:
        if not name or name in self.disk.folders:
            raise Refused(errors.IS_FOLDER)
        if name not in self.disk.files:
            raise Refused(errors.NOT_FOUND)
        return self.disk.files[name]

    async def open_file(self, name: Name) -> int:
        _checked(name)
        await self.before("open_file")
        data, found = self._require_file(name)
        descriptor = os.memfd_create("file")
        os.truncate(descriptor, len(data))
        os.pwrite(descriptor, data, 0)
        self._described[descriptor] = found
        return descriptor

    def describe(self, fd: int) -> Found:
        return self._described[fd]

    async def list_folder(self, name: Name) -> list[Entry]:
        _checked(name)
        await self.before("list_folder")
        if any(name[:depth] in self.disk.files for depth in range(1, len(name) + 1)):
            raise Refused(errors.NOT_A_FOLDER)
        if name and name not in self.disk.folders:
            raise Refused(errors.NOT_FOUND)
        entries = [Entry(one[-1], True, 0, time.time()) for one in self.disk.folders if one[:-1] == name]
        for one, (data, found) in self.disk.files.items():
            if one[:-1] == name:
                entries.append(Entry(one[-1], False, len(data), found.modified))
        return sorted(entries, key=lambda entry: entry.name)

    async def delete(self, name: Name, check: Check = anything) -> None:
        _checked(name)
        await self.before("delete")
        check(self._require_file(name)[1])
        del self.disk.files[name]

    # Uploads

    async def begin_upload(
        self,
        record: Mapping[str, Any],
        length: int | None,
        lifetime: float,
        name: Name | None = None,
        check: Check = anything,
    ) -> MemoryUpload:
        if name is not None:
            _checked(name)
        await self.before("begin")
        if name is not None:
            self.disk.require_target(name)
            check(self.disk.found(name))
        self.require_room(length or 0)
        id = secrets.token_hex(16)
        kept = self.disk.uploads[id] = Kept(record, length, lifetime, time.time())
        return MemoryUpload(self, id, kept)

    def _kept(self, id: str) -> Kept:
        if id not in self.disk.uploads:
            raise Refused(errors.UPLOAD_NOT_FOUND)
        return self.disk.uploads[id]

    async def open_upload(self, id: str) -> MemoryUpload | None:
        await self.before("open")
        kept = self._kept(id)
        if kept.holder is not None:
            kept.is_wanted = True
            return None
        return MemoryUpload(self, id, kept)

    async def look_at_upload(self, id: str) -> UploadState:
        await self.before("look")
        return self._kept(id).state

    async def list_uploads(self) -> list[str]:
        await self.before("list_uploads")
        return sorted(self.disk.uploads)

    async def list_with_parts(self) -> list[str]:
        await self.before("list_uploads")
        kept = self.disk.uploads.items()
        return sorted(id for id, one in kept if one.named is None and one.record.get("parts"))

    async def sweep_uploads(self) -> int:
        await self.before("sweep")
        uploads = self.disk.uploads
        swept = [id for id, one in uploads.items() if one.holder is None and one.state.expires < time.time()]
        for id in swept:
            del uploads[id]
        return len(swept)

    async def stop(self) -> None:
        self._is_stopped = True
        for kept in self.disk.uploads.values():
            if kept.holder is not None and kept.holder._store is self:
                kept.holder.let_go()

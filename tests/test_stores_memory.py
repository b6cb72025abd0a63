"""The store in memory that other tests use keeps the promises of a real one."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from tests.contracts import ResumableStoreContract, StoreContract
from tests.memory_store import Disk, MemoryStore


class MemoryCase(TestCase):
    """Stores that share their files, for one test."""

    def setUp(self) -> None:
        self.disk = Disk()

    def make_store(self, **options: Any) -> MemoryStore:
        store = MemoryStore(self.disk, **options)
        self.addCleanup(lambda: Deferred.fromCoroutine(store.stop()))
        return store


class StoreTests(MemoryCase, StoreContract):
    """Files."""


class ResumableTests(MemoryCase, ResumableStoreContract):
    """Uploads."""

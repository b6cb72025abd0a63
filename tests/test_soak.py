"""The soak of ``tests/soak.py``, in short."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from twisted.trial.unittest import SynchronousTestCase

from tests.soak import MIB, soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
MOST_MEMORY = 128 * MIB
"""In so short a time a slope says nothing, as a few late allocations make one; but a leak of each body is far above."""


@pytest.mark.slow
class SoakTests(SynchronousTestCase):
    """A service under mixed traffic."""

    def test_nothing_grows(self) -> None:
        """Each answer is the wanted one, nobody complains, and neither memory nor descriptors are lost."""
        folder = Path(tempfile.mkdtemp(prefix="lwstwisted-"))
        self.addCleanup(shutil.rmtree, folder)
        report = soak(folder, SECONDS)
        self.assertEqual((dict(report.wrong), report.complaints), ({}, []), report)
        self.assertEqual(report.after, report.before, report)
        self.assertLess(max(sample.memory for sample in report.samples), MOST_MEMORY, report)
        self.assertGreater(min(report.done.values()), 0)

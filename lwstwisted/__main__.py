"""The ``lwstwisted`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from lwstwisted import __version__


class FsckOptions(UsageOptions):
    """``lwstwisted fsck``."""

    longdesc = (
        "Find what crashes have left and what can't be served. Exit status, as of fsck(8): 0 nothing, 1 all of it was"
        " repaired, 4 something is left, 8 it could not be looked at."
    )
    optParameters = [["root", "r", "uploads", "Folder of the uploaded files."]]
    optFlags = [
        ["dry-run", "n", "Change nothing. [default]"],
        ["repair", "y", "Take back interrupted forms, and remove what nobody holds, as the next start would."],
        ["verify", "V", "Read every file that has a digest, and compare."],
    ]

    def postOptions(self) -> None:
        """:raises UsageError: for options that contradict each other."""
        if self["dry-run"] and self["repair"]:
            raise UsageError("--dry-run changes nothing, and --repair does; say one of them")


class SweepOptions(UsageOptions):
    """``lwstwisted sweep``."""

    longdesc = (
        "Remove the resumable uploads that have expired, as a service does once a minute, and print each of them: id,"
        " offset, length, and the file it would have become."
    )
    optParameters = [["root", "r", "uploads", "Folder of the uploaded files."]]
    optFlags = [["dry-run", "n", "Print them only."]]


class Command(UsageOptions):
    """``lwstwisted COMMAND``."""

    synopsis = "Usage: lwstwisted COMMAND [options]"

    @property
    def subCommands(self) -> list[tuple[str, None, object, str]]:
        """What it can do; the service is imported when it is asked for."""
        from lwstwisted.options import Options

        return [
            ("serve", None, Options, "Serve file uploads over HTTP(S)."),
            ("fsck", None, FsckOptions, "Look at the files of a service, or repair them."),
            ("sweep", None, SweepOptions, "Remove resumable uploads that have expired."),
        ]

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"lwstwisted {__version__}")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """:raises UsageError: without a command."""
        if self.subCommand is None:
            raise UsageError("name a command: lwstwisted serve, fsck or sweep")


def main() -> None:
    """Run a command; errors of use and of start are one line on stderr, and exit status 1 or 2."""
    command = Command()  # type: ignore[no-untyped-call]
    try:
        command.parseOptions()  # type: ignore[no-untyped-call]
    except UsageError as error:
        sys.exit(_complain(error, 2))
    run = {"fsck": fsck, "sweep": sweep}.get(command.subCommand or "", serve)
    sys.exit(run(command.subOptions))


def serve(options: Any) -> int:
    """Serve until a signal comes.

    :returns: exit status.
    """
    from twisted.logger import globalLogBeginner, textFileLogObserver

    from lwstwisted.loop.reactor import install

    reactor = install()
    from lwstwisted.service import makeService

    try:
        service = makeService(options, reactor)
        globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stdout)], redirectStandardIO=False)
        service.privilegedStartService()  # type: ignore[no-untyped-call]
        service.startService()
    except Exception as error:
        return _complain(error, 1)
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    for hint in service.hints:
        print(hint, flush=True)
    reactor.run()
    return 0


def fsck(options: Any) -> int:
    """Look at a root.

    :returns: exit status.
    """
    from lwstwisted.stores.fsck import examine

    found = []
    try:
        for finding in examine(Path(options["root"]), repair=bool(options["repair"]), verify=bool(options["verify"])):
            found.append(finding)
            print(f"{finding.path!a}: {finding.problem}{' (repaired)' if finding.is_repaired else ''}")
    except Exception as error:  # Python's own status for it, 1, would say that all is well now
        return _complain(error, 8)
    return 0 if not found else 1 if all(finding.is_repaired for finding in found) else 4


def sweep(options: Any) -> int:
    """Remove what has expired.

    :returns: exit status.
    """
    from lwstwisted.stores import fsck

    try:
        for id, state in fsck.sweep(Path(options["root"]), dry_run=bool(options["dry-run"])):
            length = "?" if state.length is None else state.length
            print(id, state.offset, length, ascii("/".join(state.record.get("target", ()))))
    except Exception as error:
        return _complain(error, 1)
    return 0


def _complain(error: Exception, status: int) -> int:
    print(f"lwstwisted: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

"""The ``lwstwisted`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from lwstwisted import __version__
from lwstwisted.running.worker import claim


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


class SignOptions(UsageOptions):
    """``lwstwisted sign``."""

    longdesc = (
        "Print a URL that lets whoever has it do what it says, at a service that knows the key (--signing-keys). For a"
        " resumable upload take POST."
    )
    optParameters = [
        ["key", "k", None, "File of keys: lines of ID:SECRET. The first one signs."],
        ["path", "P", None, "Path below /files/, percent-encoded; one that ends with a slash means all beneath."],
        ["max-size", "m", None, "Bytes of a file at most; 10M is understood. [default: no limit]"],
        ["type", "t", "", "Content-Type that the file has to be sent with. [default: any]"],
        ["expires", "e", None, "From now on; a number of hours, or 30m, 12h, 7d."],
        ["public-url", None, "", "What stands in front of our paths, such as https://up.example.org."],
    ]
    optFlags = [["overwrite", None, "Let it replace a file."]]

    def opt_method(self, method: str) -> None:
        """DELETE, GET, POST or PUT; may be repeated. [default: PUT]"""
        self.setdefault("methods", []).append(method)

    def postOptions(self) -> None:
        """:raises UsageError: for what can't be signed."""
        from lwstwisted.options import parse_size, parse_span

        for name in ("key", "path", "expires"):
            if not self[name]:
                raise UsageError(f"--{name} is needed")
        self["max-size"] = None if self["max-size"] is None else parse_size("--max-size", self["max-size"])
        self["expires"] = parse_span("--expires", self["expires"])


class CheckOptions(UsageOptions):
    """``lwstwisted check-config``."""

    synopsis = "FILE"
    longdesc = "Read a file of options as 'serve --config' would. Exit status: 0 it is good, 1 it says what isn't."

    def parseArgs(self, file: str) -> None:  # type: ignore[override]
        """Take the name of the file."""
        self["file"] = file


class Command(UsageOptions):
    """``lwstwisted COMMAND``."""

    synopsis = "Usage: lwstwisted COMMAND [options]"

    @property
    def subCommands(self) -> list[tuple[str, None, object, str]]:
        """What it can do; the service is imported when it is asked for."""
        from lwstwisted.options import Options

        return [
            ("serve", None, Options, "Serve file uploads over HTTP(S)."),
            ("check-config", None, CheckOptions, "Look for mistakes in a file of options."),
            ("fsck", None, FsckOptions, "Look at the files of a service, or repair them."),
            ("sweep", None, SweepOptions, "Remove resumable uploads that have expired."),
            ("sign", None, SignOptions, "Print a URL that lets whoever has it upload, or fetch."),
        ]

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"lwstwisted {__version__}")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """:raises UsageError: without a command."""
        if self.subCommand is None:
            raise UsageError("name a command: lwstwisted serve, check-config, fsck, sweep or sign")


def main() -> None:
    """Run a command; errors of use and of start are one line on stderr, and exit status 1 or 2."""
    claim()
    command = Command()  # type: ignore[no-untyped-call]
    try:
        command.parseOptions()  # type: ignore[no-untyped-call]
    except UsageError as error:
        sys.exit(_complain(error, 2))
    commands = {"check-config": check_config, "fsck": fsck, "sweep": sweep, "sign": sign}
    sys.exit(commands.get(command.subCommand or "", serve)(command.subOptions))


def serve(options: Any) -> int:
    """Serve until a signal comes.

    :returns: exit status.
    """
    from twisted.logger import globalLogBeginner
    from twisted.python.reflect import namedAny

    from lwstwisted.loop.reactor import install

    reactor = install()
    from lwstwisted.options import LOG_OBSERVERS
    from lwstwisted.service import makeService

    observer = namedAny(LOG_OBSERVERS[options["log-format"]])()
    try:
        service = makeService(options, reactor)
        globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False)
        service.privilegedStartService()
        service.startService()
    except Exception as error:
        return _complain(error, 1)
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    for hint in service.hints:
        print(hint, flush=True)
    reactor.run()
    return int(getattr(service, "exit_status", 0))


def check_config(options: Any) -> int:
    """Look for mistakes in a file.

    :returns: exit status.
    """
    from lwstwisted.options import Options

    try:
        Options().parseOptions(["--config", options["file"]])
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
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


def sign(options: Any) -> int:
    """Print a signed URL.

    :returns: exit status.
    """
    import time

    from lwstwisted.access.files import RereadFile
    from lwstwisted.access.signing import make_grant, parse_keys, url_of

    try:
        keys = RereadFile(options["key"], parse_keys, is_secret=True).content
        grant = make_grant(
            options["path"],
            options.get("methods", ["PUT"]),
            int(time.time() + options["expires"]),
            options["max-size"],
            options["type"],
            bool(options["overwrite"]),
        )
    except (OSError, ValueError) as error:
        return _complain(error, 1)
    print(url_of(grant, *next(iter(keys.items())), options["public-url"]))
    return 0


def _complain(error: Exception, status: int) -> int:
    for line in str(error).split("\n"):
        print(f"lwstwisted: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

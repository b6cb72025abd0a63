"""The ``lwstwisted`` command."""

from __future__ import annotations

import sys
from typing import Any

from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from lwstwisted import __version__


class Command(UsageOptions):
    """``lwstwisted COMMAND``."""

    synopsis = "Usage: lwstwisted serve [options]"

    @property
    def subCommands(self) -> list[tuple[str, None, object, str]]:
        """What it can do; the service is imported when it is asked for."""
        from lwstwisted.service import Options

        return [("serve", None, Options, "Serve file uploads over HTTP(S).")]

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"lwstwisted {__version__}")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """:raises UsageError: without a command."""
        if self.subCommand is None:
            raise UsageError("name a command: lwstwisted serve")


def main() -> None:
    """Run a command; errors of use and of start are one line on stderr, and exit status 1 or 2."""
    command = Command()  # type: ignore[no-untyped-call]
    try:
        command.parseOptions()  # type: ignore[no-untyped-call]
    except UsageError as error:
        sys.exit(_complain(error, 2))
    sys.exit(serve(command.subOptions))


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
        service.startService()  # type: ignore[no-untyped-call]
    except Exception as error:
        return _complain(error, 1)
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    for hint in service.hints:
        print(hint, flush=True)
    reactor.run()
    return 0


def _complain(error: Exception, status: int) -> int:
    print(f"lwstwisted: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()

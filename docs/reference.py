"""Writes what says all the options, from the options themselves: ``python -m docs.reference``.

That is the example of a configuration file, the man page, the completion of shells, and the table of metrics.
``tests/test_config.py`` and ``tests/test_metrics.py`` compare.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from lwstwisted import __version__
from lwstwisted.__main__ import Command
from lwstwisted.config import Configurable
from lwstwisted.options import Options
from lwstwisted.web.limits import DEFAULT_LIMITS, Limits

TOP = Path(__file__).resolve().parent.parent

EXAMPLES = {
    "access-log": '"/var/log/lwstwisted/access.log"',
    "allow-origin": '["https://example.org", "https://app.example.org"]',
    "listen": '["tcp:8080", "tcp:8081:interface=127.0.0.1"]',
    "max-size": '"10G"',
    "metrics": '"tcp:9100"',
    "public-url": '"https://up.example.org"',
    "quota": '"500G"',
    "trusted-proxy": '["127.0.0.1", "10.1.0.0/16"]',
    # Of options that are repeated, and of some that have no default.
    "auth": '["htpasswd:/etc/lwstwisted.htpasswd"]',
    "certificate": '["/etc/letsencrypt/live/up.example.org"]',
    "client-ca": '"/etc/lwstwisted.client-ca.pem"',
    "group": '\nstaff = ["alice", "bob"]',
    "allow": '\nwho = ["alice", "bob"]\nactions = ["put", "get", "list"]\npath = "/files/team/**"',
    "hooks-dir": '"/etc/lwstwisted.hooks"',
    "hooks-http": '"https://hooks.example.org/"',
    "hooks-http-forward-headers": '"Authorization,X-Request-Id"',
    "host": '["up.example.org"]',
    "signing-keys": '"/etc/lwstwisted.keys"',
}
"""What options that have no default may be. One that begins with a line break is a table, and comes last."""


def doc_of(options: Configurable, name: str) -> str:
    """What an option is for."""
    return " ".join((options.docs[name] or "").split())


def limits() -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each limit."""
    said = inspect.getdoc(Limits) or ""
    for field in fields(Limits):
        found = re.search(rf":ivar {field.name}: (.*?)(?=\n:ivar|\Z)", said, re.DOTALL)
        default = getattr(DEFAULT_LIMITS, field.name)
        yield field.name.replace("_", "-"), f"{default}", _with_dashes(" ".join(found[1].split())) if found else ""


def _with_dashes(text: str) -> str:
    return re.sub(r"``(\w+)``", lambda found: found[1].replace("_", "-"), text)


def example() -> str:
    """``etc/lwstwisted.toml``."""
    options = Options()
    plain, tables = [], []
    for name, takes_value in sorted(options.settings.items()):
        comment = doc_of(options, name)
        if name == "limit":
            continue
        default = options.defaults.get(name)
        if not takes_value:
            value = "false"
        elif default in (None, ""):
            value = EXAMPLES[name]
            comment += "" if "[default:" in comment else " [default: none]"
        else:
            value = str(default) if isinstance(default, int) else f'"{default}"'
            comment += "" if "[default:" in comment else f" [default: {default}]"
        lines = wrap(comment, 118, break_on_hyphens=False)
        header = f"[[{name}]]" if name in options.rows else f"[{name}]"
        text = [f"# {line}" for line in lines]
        setting = [header, *value[1:].split("\n")] if value.startswith("\n") else [f"{name} = {value}"]
        (tables if value.startswith("\n") else plain).append("\n".join([*text, *[f"#{line}" for line in setting]]))
    of_limits = [
        "\n".join([*[f"# {line}" for line in wrap(f"{name}: {meaning}", 118)], f"#{name} = {default}"])
        for name, default, meaning in limits()
    ]
    head = (
        "# Options of the lwstwisted service: lwstwisted serve --config FILE. Its command line has the same names.\n"
        "# What that says of an option replaces what is here. What is commented out is the default, or an example\n"
        "# where there is none. lwstwisted check-config FILE looks for mistakes."
    )
    table = "# What one client may take. Times are in seconds.\n[limit]"
    return "\n\n".join([head, *plain, *tables, table, *of_limits]) + "\n"


def commands() -> list[tuple[str, Any, str]]:
    """Each command: its name, its options, and what it is for."""
    command = Command()
    found = []
    for name, _, kind, meaning in command.subCommands:
        options = kind()
        options.parent = command
        found.append((name, options, meaning))
    return found


def long_options(options: Any) -> list[tuple[str, str, bool]]:
    """Long name, short name or "", and whether it takes a value."""
    short = {long: name for name, long in options.synonyms.items() if len(name) == 1}
    names = sorted((name.removesuffix("="), name.endswith("=")) for name in options.longOpt)
    return [(name, short.get(name, ""), takes_value) for name, takes_value in names]


def roff(text: str) -> str:
    """Text that a man page shows as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text[:1] in (".", "'") else text


def manual() -> str:
    """``docs/lwstwisted.1``."""
    lines = [
        f'.TH LWSTWISTED 1 "" "lwstwisted {__version__}" "User Commands"',
        ".SH NAME",
        "lwstwisted \\- file uploads over HTTP(S)",
        ".SH SYNOPSIS",
        ".B lwstwisted",
        ".I COMMAND",
        "[options]",
        ".SH COMMANDS",
    ]
    for name, options, meaning in commands():
        said = getattr(options, "longdesc", "")
        lines += [f".SS {roff(name)} {roff(getattr(options, 'synopsis', ''))}".rstrip()]
        lines += [roff(f"{meaning} {said}".strip())]
        for long, short, takes_value in long_options(options):
            keys = f"\\fB\\-{short}\\fR, " * bool(short) + f"\\fB\\-\\-{roff(long)}\\fR"
            default = options.defaults.get(long)
            text = doc_of(options, long)
            if default not in (None, "", 0) and "[default:" not in text:
                text += f" [default: {default}]"
            lines += [".TP", keys + "=\\fIVALUE\\fR" * takes_value, roff(text)]
    lines += [".SH LIMITS", roff("Of --limit, and of the table [limit] of a file. Times are in seconds.")]
    for name, default, meaning in limits():
        lines += [".TP", f"\\fB{roff(name)}\\fR={default}", roff(meaning)]
    lines += [
        ".SH FILES",
        ".TP",
        "\\fB/etc/lwstwisted.toml\\fR",
        roff("Options, if --config says so: TOML, with the names of the options of serve."),
        ".SH SIGNALS",
        ".TP",
        "\\fBSIGHUP\\fR",
        "The access log is opened again.",
        ".SH EXIT STATUS",
        roff("0 for success, 1 for an error, 2 for wrong use. fsck has more."),
    ]
    return "\n".join(lines) + "\n"


BASH = """\
# Completion of lwstwisted for bash: to /usr/share/bash-completion/completions/lwstwisted.

_lwstwisted() {
    local current=${COMP_WORDS[COMP_CWORD]} words
    case ${COMP_WORDS[1]} in
%(cases)s
        *) words="%(commands)s --help --version" ;;
    esac
    if ((COMP_CWORD == 1)); then
        words="%(commands)s --help --version"
    fi
    if ((COMP_CWORD == 1)) || [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
    fi
}
complete -o filenames -F _lwstwisted lwstwisted
"""


def bash_completion() -> str:
    """``etc/completion/lwstwisted.bash``."""
    cases = [
        f'        {name}) words="{" ".join("--" + long for long, _, _ in long_options(options))}" ;;'
        for name, options, _ in commands()
    ]
    return BASH % {"cases": "\n".join(cases), "commands": " ".join(name for name, _, _ in commands())}


def metrics_table() -> str:
    """``docs/metrics.md``."""
    from lwstwisted.metrics import METRICS

    lines = [
        "# Metrics",
        "",
        "`lwstwisted serve --metrics tcp:9100` tells these at `http://127.0.0.1:9100/metrics`. With several processes",
        "counters and histograms are sums; a gauge is what its last column says of those that run.",
        "",
        "| name | kind | labels | what it is | together |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        together = metric.together if metric.kind == "gauge" else "sum"
        lines.append(f"| `{metric.exposed}` | {metric.kind} | {labels} | {metric.help} | {together or 'the root'} |")
    return "\n".join(lines) + "\n"


def documents() -> dict[Path, str]:
    """All of them."""
    return {
        TOP / "etc" / "lwstwisted.toml": example(),
        TOP / "etc" / "completion" / "lwstwisted.bash": bash_completion(),
        TOP / "docs" / "lwstwisted.1": manual(),
        TOP / "docs" / "metrics.md": metrics_table(),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(path.relative_to(TOP))

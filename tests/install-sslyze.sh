#!/bin/sh
# Installs sslyze, which judges a server by Mozilla's guidelines, into a virtual environment of its own: it wants other
# versions of what we use. Never fails: the tests that need it are skipped and say so.
set -eu
cd "$(dirname "$0")/.."

folder=.venv/sslyze
[ ! -x "$folder/bin/sslyze" ] || exit 0
python=.venv/bin/python
[ -x "$python" ] || python=python3
echo "tests: installing sslyze into $folder"
{ "$python" -m venv --clear "$folder" && "$folder/bin/python" -m pip -q --disable-pip-version-check install sslyze; } </dev/null ||
    echo "tests: sslyze could not be installed; tests that need it will be skipped"

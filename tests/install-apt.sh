#!/bin/sh
# Installs the packages of those commands in tests/apt-packages that are missing.
# Never fails: a test whose command is missing is skipped and says so.
set -eu
cd "$(dirname "$0")"

packages=
while read -r command package; do
    case $command in '' | '#'*) continue ;; esac
    command -v "$command" >/dev/null || packages="$packages $package"
done <apt-packages

[ -n "$packages" ] || exit 0
# $packages is a list of words from here on.
if ! command -v apt-get >/dev/null; then
    echo "tests: not installed, for there is no apt-get:$packages (some tests will be skipped)"
elif [ "$(id -u)" != 0 ]; then
    echo "tests: some tests will be skipped; to run them: sudo apt-get install$packages"
else
    echo "tests: installing with apt-get:$packages"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends $packages; } </dev/null >/dev/null ||
        echo "tests: apt-get failed; tests that need$packages will be skipped"
fi

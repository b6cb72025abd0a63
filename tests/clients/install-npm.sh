#!/bin/sh
# Installs what package.json names into node_modules, if it isn't there yet.
# Never fails: a test whose client is missing is skipped and says so.
set -eu
cd "$(dirname "$0")"

# A copy of the lock file that was installed.
stamp=node_modules/.installed
if [ -e "$stamp" ] && cmp -s package-lock.json "$stamp"; then
    exit 0
elif ! command -v npm >/dev/null; then
    echo "tests: npm is not installed, so tests that need clients in JavaScript will be skipped"
else
    echo "tests: installing clients with npm"
    { npm ci --silent </dev/null && cp package-lock.json "$stamp"; } ||
        echo "tests: npm failed; tests that need clients in JavaScript will be skipped"
fi

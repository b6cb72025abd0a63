# Two commands matter: "make run" and "make test". "make help" lists the others.

PORT ?= 8443
ROOT ?= ./uploads
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
# Importing twisted.web.static uses classes that Twisted itself deprecates (setup.cfg says it to pytest).
TWISTED_WARNS := ignore:twisted.web.resource._Unsafe:DeprecationWarning
PIP := PIP_USER=0 $(BIN)/python -m pip -qq --disable-pip-version-check

# A virtual environment holds its own absolute path. The stamps carry that path in
# their names, so a folder that was moved or copied gets a new environment.
HERE := $(subst /,+,$(CURDIR))
INSTALLED := $(VENV)/.installed$(HERE)
INSTALLED_TEST := $(VENV)/.installed-test$(HERE)

# What only looks at services from outside is the same under any runner, and takes longest: pytest runs it.
FROM_OUTSIDE := bad_network crash disks hostile_files powercut proxies racer resumable_clients soak
BY_TRIAL := $(filter-out $(FROM_OUTSIDE:%=tests/test_%.py),$(wildcard tests/test_*.py))

.DEFAULT_GOAL := help
.PHONY: help run test quick bench fuzz powercut suites crash soak resume lint clean
.NOTPARALLEL:

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1	/p' $(MAKEFILE_LIST)

run: $(INSTALLED)  ## serve uploads over HTTPS; PORT=8443 ROOT=./uploads
	@exec $(BIN)/lwstwisted serve --root "$(ROOT)" --port "$(PORT)"

test: $(INSTALLED_TEST) lint  ## linter, type checks and all tests, by pytest and by trial
	@tests/install-apt.sh
	@tests/clients/install-npm.sh
	@tests/install-sslyze.sh
	$(BIN)/python -m pytest
	$(BIN)/python -W error -W "$(TWISTED_WARNS)" -m twisted.trial --reactor=lws $(BY_TRIAL)

quick: $(INSTALLED_TEST)  ## the fast tests only, up to the first failure
	$(BIN)/python -m pytest -q -x -m "not slow"

bench: $(INSTALLED_TEST)  ## what the loop costs, beside stock Twisted and a loop in C (six minutes)
	$(BIN)/python -m bench.paused
	$(BIN)/python -m bench.echo
	$(BIN)/python -m bench.sink

suites: $(INSTALLED_TEST)  ## Twisted's own suites on its reactors and on ours (six minutes)
	$(BIN)/python -m tests.suites

fuzz: $(INSTALLED_TEST)  ## look for bytes that break framing or forms (ten minutes)
	@$(PIP) install --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz

powercut: $(INSTALLED_TEST)  ## cut the power under load: 500 times by shutdown, 2000 by the log of blocks, 2000 by that of calls (root; 15 minutes)
	@tests/install-apt.sh
	$(BIN)/python -m tests.powercut

crash: $(INSTALLED_TEST)  ## kill a service under load 300 times, and see what is left of its promises (ten minutes)
	$(BIN)/python -m tests.crash

soak: $(INSTALLED_TEST)  ## mixed traffic for half an hour: nothing may grow, nobody may complain
	$(BIN)/python -m tests.soak

resume: $(INSTALLED_TEST)  ## cut uploads of eight clients a dozen times each, and fifty on a bad network (five minutes)
	@tests/install-apt.sh
	@tests/clients/install-npm.sh
	RESUME_MIB=64 RESUME_CUTS=4 $(BIN)/python -m pytest -s tests/test_resumable_clients.py
	$(BIN)/python -m tests.test_bad_network 50 20

lint: $(INSTALLED_TEST)  ## linter and type checks
	$(BIN)/ruff check .
	$(BIN)/mypy lwstwisted twisted/plugins/lwstwisted_plugin.py examples

clean:  ## remove all that was made, but no uploads
	rm -rf $(VENV) build dist *.egg-info _trial_temp* .hypothesis .pytest_cache .mypy_cache .ruff_cache
	rm -f twisted/plugins/dropin.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The last line of the recipe refreshes Twisted's plugin cache, so that no old one is trusted.
$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: apt-get install python3, or make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --editable .
	@rm -f twisted/plugins/dropin.cache
	@$(BIN)/python -c 'from twisted.plugin import IPlugin, getPlugins; list(getPlugins(IPlugin))'
	@touch $@

$(INSTALLED_TEST): $(INSTALLED)
	@echo "installing what the tests need into $(VENV) ..."
	@$(PIP) install --editable '.[test]'
	@touch $@

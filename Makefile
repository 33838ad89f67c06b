# Every target does its own set-up: a virtual environment in .venv, once, and again when setup.cfg
# changes.  PYTHON=... chooses the interpreter, ARGS=... goes to the program that is run.

VENV := .venv
RUN := $(VENV)/bin/python
comma := ,
empty :=
space := $(empty) $(empty)

# The drivers come along as soon as the demo is sent to a PostgreSQL server, or runs tasks.
for-postgresql = $(if $(findstring postgresql,$(ARGS)),$(1))
for-tasks = $(if $(findstring --async,$(ARGS)),$(1))
DEMO := $(subst $(space),$(comma),$(strip cli \
  $(call for-postgresql,postgres psycopg $(call for-tasks,asyncpg)) $(call for-tasks,aiosqlite)))

.PHONY: help demo test lint type bench soak clean

help:
	@echo "make demo    QueuePool and ManagedPool under the same load, side by side, within a minute"
	@echo "             (another database: make demo ARGS=\"--url postgresql+psycopg2://...\";"
	@echo "             on asyncio: make demo ARGS=--async)"
	@echo "make test    the tests, on SQLite and on a PostgreSQL server that they start themselves"
	@echo "make lint    format and lint rules"
	@echo "make type    type annotations"
	@echo "make bench   the figures of the README (ARGS=--quick for a look in a minute)"
	@echo "make soak    ten minutes of load while network and server fail at random, and a verdict"
	@echo "             (ARGS=\"--seconds 60 --seed 1\" for a look, or to see a failure again)"
	@echo "make clean   removes what the others made"

demo: $(VENV)/.has-$(DEMO)
	@$(RUN) -m sqla_poolkit demo $(ARGS)

test: $(VENV)/.has-test
	@$(RUN) -m pytest -n 3 --dist worksteal $(ARGS)

lint: $(VENV)/.has-dev
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .

type: $(VENV)/.has-dev
	@$(RUN) -m mypy --strict sqla_poolkit

bench: $(VENV)/.has-test
	@$(RUN) -m benchmarks $(ARGS)

soak: $(VENV)/.has-test
	@$(RUN) -m tests.chaos --seconds 600 --every 5 --memory $(ARGS)

clean:
	rm -rf $(VENV) .cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.has-%: setup.cfg setup.py $(VENV)/.made
	@echo "Installing what '$(@:$(VENV)/.has-%=%)' needs into $(VENV) ..."
	@$(RUN) -m pip install -qq --disable-pip-version-check -e '.[$*]' || { \
	  echo "The installation failed; the message above says why. It needs the network." >&2; \
	  exit 1; }
	@touch $@

# Debian's python3 can come without venv and pip, a Python of one's own without SQLite.
$(VENV)/.made:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.10 python3 python; do \
	  if $$python -c 'import sys, venv, ensurepip, ssl, sqlite3; sys.exit(sys.version_info < (3, 10))' \
	      2>/dev/null; then \
	    echo "Making a virtual environment in $(VENV) with $$($$python --version) ..."; \
	    $$python -m venv --clear $(VENV) && touch $@ && exit 0; \
	    exit 1; \
	  fi; \
	done; \
	echo "No suitable Python here: it takes 3.10 or newer, with venv, pip, ssl and sqlite3." >&2; \
	echo "Debian and Ubuntu: apt-get install python3 python3-venv.  macOS: brew install python." >&2; \
	echo "One that is not on the PATH: make PYTHON=/path/to/python3 ..." >&2; \
	exit 1

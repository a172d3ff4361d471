# make demo   trains a gated adapter on BANKING77 (about 5 minutes on 2 CPU cores)
# make test   runs the whole test suite
# make check  what a change must pass: format, lint, types, tests with coverage

PYTHON ?= python3.11
VENV := .venv
PIP := $(VENV)/bin/pip
RUN := $(VENV)/bin/python

# Nothing here needs the model hub. One thread a worker: two workers fill two cores.
export HF_HUB_OFFLINE := 1
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n 2

.PHONY: help install demo test check format clean

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/.installed-dev

demo: $(VENV)/.installed-demo
	$(VENV)/bin/pelton fit banking77

test: $(VENV)/.installed-dev
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(PYTEST) --cov --cov-report=term

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache

# PyTorch comes first and by plain pip, so that the CPU wheel is taken where pip is set up to prefer it.
$(VENV)/.installed-torch: constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml
	$(PIP) install -c constraints.txt -e '.[$*]'
	touch $@

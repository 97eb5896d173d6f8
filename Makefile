# `make quickstart` and `make test` set up all they need on a machine with Python 3.11, pip, git, make and a C compiler.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
ROOT ?= runs
export HF_HUB_OFFLINE ?= 1
export UV_SYSTEM_CERTS ?= 1

.PHONY: setup quickstart quickstart-short test soak check docs audit pins browser clean

setup: $(READY)

# uv installs the stack in half a minute; the exact versions are those of requirements.txt.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

quickstart: $(READY)
	$(BIN)/python pipeline.py run configs/quickstart.yaml --root $(ROOT)
	@echo
	@echo "next:  $(BIN)/python pipeline.py chat configs/quickstart.yaml                          talk to what you trained; it knows, for one: Name the opposite of big."
	@echo "       $(BIN)/python pipeline.py plan configs/quickstart.yaml stages.dpo.beta=0.05     see what a change would redo"
	@echo "       $(BIN)/python pipeline.py run configs/sft_dpo.yaml sources.base.model=DIR sources.chat.data=FILE ...   your own data"

# The same chain with fewer steps: it shows that everything runs, not that the numbers rise.
quickstart-short: $(READY)
	$(BIN)/python pipeline.py run configs/quickstart.yaml --root $(ROOT) run=quickstart-short stages.sft.max_steps=20 stages.dpo.max_steps=10

test: $(READY) check
	$(BIN)/python -m pytest

# Runs that are killed at N random moments, each held against one that was not; the last line is `identical: K of N`.
N ?= 200
SEED ?= 0
soak: $(READY)
	$(BIN)/python -m tests.faults.soak $(N) --seed $(SEED)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The documentation as a site: open build/docs/index.html. Only search wants a server, such as `mkdocs serve`. A broken link ends it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Known vulnerabilities of the pinned versions, asked of the Python Packaging Advisory Database; needs the network.
audit: $(READY)
	$(BIN)/pip-audit --requirement requirements.txt --no-deps --disable-pip --strict --progress-spinner off

# The newest versions that pyproject.toml allows, without addresses, so that no registry is named.
pins: $(READY)
	echo '# Exact versions of all that the project is built and tested with, made by `make pins`.' > requirements.txt
	$(BIN)/uv pip compile --quiet --upgrade --group dev --group docs pyproject.toml --no-header --no-annotate --no-emit-index-url --no-emit-find-links >> requirements.txt

# A Chromium, in which pages are tested as a person would use them; without one these tests are skipped. Debian and its kin, as root.
browser:
	apt-get update --quiet
	apt-get install --yes --quiet --no-install-recommends chromium

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Targets for people; `make help` lists them. Everything runs in the virtual environment $(VENV).

VENV        ?= .venv
PYTHON      ?= $(shell for p in python3.11 python3.12 python3.13; do $$p --version >/dev/null 2>&1 && echo $$p && break; done)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
CONFIG      ?= configs/demo.yaml
SET         ?=
BIN         := $(VENV)/bin
LORAPAR     := $(BIN)/lorapar
STAGES      := $(shell sed -n 's/^ORDER = (\(.*\))/\1/p' stages/__init__.py | tr -d '",')
READY       := $(VENV)/.ready
FULL        := $(VENV)/.full
MODEL       := models/smollm2-135m-q4
DATA        := data/demo/test.jsonl

.DEFAULT_GOAL := help
.PHONY: help setup demo smoke tables test test-all torture gpu-check check reference docs dist constraints licences fix clean $(STAGES)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "$(STAGES)" | tr ' ' '\n' | sed 's/$$/\tRun this stage of CONFIG=file (SET="key=value …")/' | expand -t 12

setup: $(FULL) ## Make the virtual environment and install everything, vLLM too

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) bash .ci/setup.sh
	@touch $@

$(FULL): $(READY)
	VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) bash .ci/setup.sh full
	@touch $@

$(MODEL)/config.json: | $(READY)
	$(LORAPAR) fetch smollm2-135m-q4

models/tiny-random/config.json: | $(READY)
	$(LORAPAR) fetch tiny-random

$(DATA): | $(READY)
	$(LORAPAR) demo-data data/demo

demo: $(READY) $(MODEL)/config.json $(DATA) ## Run the whole pipeline on SmolLM2-135M and draw the page of the run
	$(LORAPAR) plan configs/demo.yaml $(foreach s,$(SET),--set $(s))
	$(LORAPAR) run configs/demo.yaml $(foreach s,$(SET),--set $(s))
	$(LORAPAR) report configs/demo.yaml $(foreach s,$(SET),--set $(s)) --out runs/demo/report

smoke: $(READY) models/tiny-random/config.json $(DATA) ## Run the whole pipeline on a random two-layer model
	rm -rf runs/smoke
	$(LORAPAR) run configs/smoke.yaml

$(STAGES): $(READY)
	$(LORAPAR) $@ $(CONFIG) $(foreach s,$(SET),--set $(s))

OTHERS      := labels theta # of the paper, and made in another form below
TABLES      := $(filter-out $(OTHERS:%=configs/tables/%.yaml),$(wildcard configs/tables/*.yaml))
SMALL       := --base configs/smoke.yaml --seeds 0
THETA       := configs/tables/theta.yaml --only base --only '*: θ 0.9' --only 'QKVGUD*[:s] θ 0.[19]' --only 'QKVGUD: all*' # of 40 rows

tables: $(READY) models/tiny-random/config.json $(DATA) ## Make the paper's tables and figures in their form, on a random two-layer model
	OMP_NUM_THREADS=1 $(LORAPAR) sweep $(TABLES) $(SMALL) --jobs 2
	OMP_NUM_THREADS=1 $(LORAPAR) sweep $(THETA) $(SMALL) --jobs 2
	$(LORAPAR) report $(TABLES) $(SMALL) --out runs/tables
	$(LORAPAR) report $(THETA) $(SMALL) --out runs/tables/theta

# Three processes keep two cores busy: some tests wait. Tests of a file share what is made for them.
test: $(READY) ## Run the quick tests, in two minutes (no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile -m "not vllm and not slow and not gpu"

test-all: $(FULL) test smoke tables $(MODEL)/config.json ## Run all tests: slow ones, real servers, every back end, tables (20 minutes)
	LORAPAR_THOROUGH=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not vllm"
	$(BIN)/python -m pytest -m vllm

torture: $(READY) ## Kill, fill, damage, signal and attack at random by the thousand (hours; LORAPAR_SEED repeats)
	LORAPAR_TORTURE=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/torture tests/sandbox/test_hostile.py

gpu-check: $(READY) ## Show in one table what works and what it costs on a GPU (FLAGS=--small: in miniature, without one)
	$(BIN)/python benchmarks/gpu.py $(FLAGS)

check: $(READY) docs ## Lint, format, types, sizes, words, and the guide: is it what the code says, do its links lead anywhere
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/python tests/sizes.py
	$(BIN)/python tests/words.py
	$(BIN)/python tests/reference.py --check
	$(BIN)/python benchmarks/replicates.py --check

reference: $(READY) ## Write the guide's reference pages and schemas from the code
	$(BIN)/python tests/reference.py

docs: $(READY) ## Build the guide as a site: site/index.html
	$(BIN)/zensical build --strict

dist: $(READY) ## Build the source archive and the wheel into dist/
	rm -rf dist
	trap 'rm -f lorapar_cli/commit.txt' EXIT; git describe --always --dirty > lorapar_cli/commit.txt && \
		$(BIN)/python -m build --no-isolation --quiet

constraints: $(READY) ## Write the versions that are installed here to .ci/constraints.txt
	$(BIN)/python .ci/constraints.py

licences: $(READY) ## List what is installed, with versions and licences
	$(BIN)/python .ci/licences.py

fix: $(READY) ## Mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove runs, the demonstration set and fetched models, and nothing of yours
	rm -rf runs site .cache dist data/demo models/smollm2-135m-q4 models/tiny-random
	rmdir --ignore-fail-on-non-empty data models 2>/dev/null || true

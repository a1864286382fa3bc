PY := .venv/bin/python
# Files of tests run side by side, the longest ones of tests/durations.md first, so that none is left
# alone at the end; each worker takes up to 6 GB.
WORKERS ?= 2
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
.DEFAULT_GOAL := help
.PHONY: help gpu-check gpu-check-te setup setup-te setup-torchtitan test test-fast test-main test-versions test-tokenizers test-engines durations support-matrix check format quickstart study results docs clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## Create or refresh .venv (at once when it is up to date)
	@scripts/bootstrap.sh

setup-te: setup ## Build Transformer Engine into .venv, for the preflight's real modules (no GPU needed)
	@scripts/setup_te.sh

setup-torchtitan: setup ## Install torchtitan beside .venv, for the test of examples/torchtitan
	@scripts/setup_torchtitan.sh

test: setup ## Run all tests; narrow them with ARGS="-k name"
	$(PYTEST) $(ARGS)

test-fast: setup ## Run the tests not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

test-main: setup ## Run the fast tests against a checkout of Megatron-LM (MEGATRON=path)
	scripts/overlay.sh main --no-deps $(or $(MEGATRON),$(error MEGATRON is not set: name a checkout of Megatron-LM, MEGATRON=path))
	$(PYTEST:$(PY)%=.venv/overlays/main/bin/python%) -m "not slow" $(ARGS)

test-versions: setup ## Test other versions of torch, transformers and Python (ONLY="torch-2.15", ARGS="-m 'not slow'")
	$(PY) -m tests.versions $(ONLY) $(if $(ARGS),-- $(ARGS))

test-tokenizers: setup ## Compare training and transformers on tokenizers of npm packages (100 MB)
	$(PY) -m pytest tests/public_tokenizers.py $(ARGS)

test-engines: setup ## Run exported models in other engines (1.4 GB of packages, kept in ~/.cache)
	$(PY) -m pytest tests/engines/engines.py $(ARGS)

durations: setup ## Run all tests and write tests/durations.md, what each file costs
	$(PYTEST) --junitxml=runs/durations.xml
	$(PY) -m tests.durations runs/durations.xml

support-matrix: setup ## Run the tests of parallel layouts and write docs/support-matrix.md and docs/arguments.md
	$(PY) -m pytest tests/integration/test_layouts.py tests/integration/test_resharding.py \
	  tests/integration/test_bad_input.py --junitxml=runs/support-matrix.xml
	$(PY) -m tests.support_matrix runs/support-matrix.xml
	$(PY) -m tests.judged_page

check: setup ## Lint, check the format, the types, who imports whom and the age of generated pages
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/shellcheck examples/*/*.sh examples/slurm/*.sbatch scripts/*.sh findings/*.sh .ci/run
	.venv/bin/hadolint Dockerfile
	$(PY) -m tests.support_matrix --check
	$(PY) -m tests.judged_page --check

format: setup ## Format the code and sort the imports
	$(PY) -m ruff check --select I --fix
	$(PY) -m ruff format

# A machine with a GPU may have a Python of its own, without this project's .venv.
GPU_PYTHON := $(if $(wildcard $(PY)),$(PY),python3)
GPU_OUTPUT := runs/gpu-check

gpu-check: ## Measure the GPU of this machine within ten minutes (GPU_OUTPUT=folder, ARGS="--stages kernels")
	$(GPU_PYTHON) benchmarks/gpu/check.py --output $(GPU_OUTPUT) $(ARGS)

gpu-check-te: ## The same for the arms that need Transformer Engine, in bf16 and fp8
	$(GPU_PYTHON) benchmarks/gpu/check.py --output $(GPU_OUTPUT)-te --stages ceilings te $(ARGS)

quickstart: setup ## Train a baseline and a superposition run on this machine and compare them (BPE=1: subwords)
	$(PY) tools/quickstart.py $(if $(BPE),--bpe)

STUDY := proxy
TEXT_OF_long := prose
TEXT_OF_subwords := prose-bpe2048
TEXT_OF_gpu := web
STUDY_TEXT := runs/studies/text/$(or $(TEXT_OF_$(STUDY)),python-packages)

study: setup $(STUDY_TEXT).json ## Run a grid of runs that is in examples/studies, for hours (STUDY=name), and compare them
	$(PY) tools/run_study.py examples/studies/$(STUDY).yaml
	$(PY) tools/compare_runs.py runs/studies/$(STUDY)/results.csv \
	  --output runs/studies/$(STUDY)/report.html

# Tables in docs/results, a study each.
RESULTS := proxy long subwords

results: setup ## Draw the figures and write the numbers of docs/results.md anew, from the tables in docs/results
	set -e; for name in $(RESULTS); do \
	  $(PY) tools/compare_runs.py docs/results/$$name.csv --output runs/results/$$name.html \
	    --figures runs/results/$$name --tables docs/results/$$name.md; \
	  for figure in docs/images/results/$$name/*; do cp runs/results/$$name/$${figure##*/} $$figure; done; \
	done
	$(PY) -m tests.results_page
	$(PY) tools/explain_gain.py docs/results/origins.csv --tables docs/results/origins-tables.md \
	  --figures docs/images/results/origins > /dev/null
	$(PY) -m tests.origins_page
	$(PY) tools/explain_gain.py docs/results/subwords-origins.csv \
	  --tables docs/results/subwords-origins.md > /dev/null

docs: setup ## Build the pages of docs/ and of the API as a site: site/index.html
	$(PY) -m mkdocs build --quiet

runs/studies/text/prose.jsonl: | setup
	$(PY) examples/studies/prose.py --output $@

runs/studies/text/prose.json: runs/studies/text/prose.jsonl
	$(PY) tools/preprocess_data.py --input $< --byte-level --shuffle-seed 0 --output-prefix $(basename $@)

runs/studies/text/prose-bpe2048.json: runs/studies/text/prose.jsonl
	$(PY) tools/preprocess_data.py --input $< --train-bpe 2048 --shuffle-seed 0 --output-prefix $(basename $@)

# Eight of the fourteen files of the sample of 10 billion tokens: 17 GB, some 5.5 billion tokens.
WEB := runs/studies/text/fineweb-edu
runs/studies/text/web.json: | setup
	.venv/bin/hf download HuggingFaceFW/fineweb-edu --repo-type dataset \
	  --include 'sample/10BT/00[0-7]_*.parquet' --local-dir $(WEB)
	$(PY) tools/preprocess_data.py --input $(WEB)/sample/10BT/000_00000.parquet \
	  --max-bytes 300000000 --train-bpe 16384 --output-prefix runs/studies/text/web-bpe
	$(PY) tools/preprocess_data.py --input $(WEB)/sample/10BT --shuffle-seed 0 \
	  --tokenizer runs/studies/text/web-bpe-tokenizer --output-prefix runs/studies/text/web

runs/studies/text/python-packages.json: | setup
	$(PY) tools/preprocess_data.py --input .venv/lib/python3*/site-packages --extensions .py \
	  --byte-level --shuffle-seed 0 --max-bytes 60000000 --output-prefix runs/studies/text/python-packages

clean: ## Remove .venv, caches and build products (runs/ stays)
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each target sets up what it needs, in .venv where the package is not installed already (see bootstrap.sh).
SHELL := /bin/bash
SETUP := root=$(CURDIR); . ./bootstrap.sh; bootstrap dev

.PHONY: test check docs plot parity mutants chaos

# Everything that needs no GPU. ARGS="-k name" for a part, ARGS=--max-ranks=8 for more ranks.
test:
	@$(SETUP); exec "$$python" -m pytest $(ARGS)

# Lint, format, types, import layers, generated docs, shipped recipes.
check:
	@$(SETUP); set -ex; \
	"$$python" -m ruff check .; \
	"$$python" -m ruff format --check .; \
	"$$python" -m mypy; \
	"$$python" -m pytest tests/test_imports.py tests/test_docs.py tests/config/test_document.py; \
	"$$python" -m torchtitan_lite config check train_configs/*.toml

# Every mesh of tests/parity against the single process; rewrites the table in docs/parallelism.md. ARGS="--only tp".
parity:
	@$(SETUP); exec "$$python" -m tests.parity $(ARGS)

# Bugs put into the running product, each of which the comparison must catch; rewrites its table too.
mutants:
	@$(SETUP); exec "$$python" -m tests.parity.mutate $(ARGS)

# Processes killed, checkpoints damaged, disks filled, links cut: nothing may be lost. ARGS="--only damages".
chaos:
	@$(SETUP); exec "$$python" -m tests.chaos $(ARGS)

# What is generated from the code.
docs:
	@$(SETUP); "$$python" -m torchtitan_lite config docs > docs/configuration.md; "$$python" docs/quote.py

# The README's picture, from a fresh run of the default recipe.
plot:
	@$(SETUP); NPROC=2 ./run_train.sh train_configs/llama3_debug.toml --job.dump_folder=outputs/readme && \
	"$$python" benchmarks/plot_loss.py outputs/readme docs/images/loss.svg

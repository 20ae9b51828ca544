# The machine needs Python 3.11 or newer and make; for the tests also a C++ compiler, for learn2learn a C compiler and for minimum uv.
# Everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-quick test-all check docs reproduce gpu release minimum learn2learn clean

demo: .venv/installed
	$(BIN)/python benchmarks/demo.py

# Two tests run at a time, each with one thread unless it asks for two; passive: threads that wait leave the cores to others.
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

test: .venv/dev-installed
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# For the edit loop, under two minutes: the mathematics, each algorithm, and one run of the command.
QUICK := tests/test_rooms.py tests/core tests/functional tests/algorithms/test_every_algorithm.py \
	tests/test_cli.py::test_fit_then_test_leaves_logs_checkpoints_and_pictures
test-quick: .venv/dev-installed
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(QUICK)

test-all: .venv/dev-installed
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site: build/docs/index.html. Warnings are errors; the notebooks are run.
docs: .venv/docs-installed
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --define nb_execution_mode=force --doctree-dir build/docs-trees --conf-dir docs . build/docs

# Builds what would be published, and runs the demo with it in an environment that has nothing else.
release: .venv/installed
	rm -rf dist build/release
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet dist/*.whl
	cd build/release && bin/python -c "import lightning_maml as m; assert 'site-packages' in m.__file__, m.__file__"
	build/release/bin/python benchmarks/demo.py

# The tests with the oldest versions that pyproject.toml allows; needs uv.
minimum:
	uv venv --clear --python 3.11 build/minimum
	uv pip install --python build/minimum/bin/python --resolution lowest-direct --editable . --group dev
	$(THREADS) build/minimum/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# Accuracies: benchmarks/reproduce.py has the rows. make reproduce ROW=omniglot_5w1s_maml ROOT=data SEEDS="0 1 2" ITERATIONS=3000
ROOT ?= data
SEEDS ?= 0 1 2
reproduce: .venv/installed
	@test -n "$(ROW)" || (echo "Expected ROW to be a row of the tables but got none: $(BIN)/python benchmarks/reproduce.py --list has them."; exit 1)
	$(BIN)/python benchmarks/reproduce.py $(ROW) --root $(ROOT) --seeds $(SEEDS) $(ITERATIONS:%=--iterations %)

# All that is to be measured on a GPU, quickest first; figures go to the screen and to build/gpu. make gpu ROOT=data
# What fails does not stop the rest, and is named at the end. ROOT has Omniglot. The trainings write to benchmarks/accuracy.
gpu: .venv/dev-installed learn2learn
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('Expected a GPU that torch can use but got none; see nvidia-smi.')"
	mkdir -p build/gpu && rm -f build/gpu/failed
	$(call note,tests,$(BIN)/python -m pytest -m "not slow" -k "cuda or gpu")
	$(call note,convolutions,$(BIN)/python benchmarks/convolutions.py --device cuda)
	$(call note,convolutions-bf16,$(BIN)/python benchmarks/convolutions.py --device cuda --dtype bfloat16 --channels last)
	$(call note,end_to_end,$(BIN)/python benchmarks/end_to_end.py --device cuda --root $(ROOT) --iterations 2000)
	$(call note,speed,$(BIN)/python benchmarks/speed.py --device cuda --json build/gpu/speed.json)
	$(call note,memory,$(BIN)/python benchmarks/memory.py --device cuda)
	$(call note,scaling,$(BIN)/python benchmarks/scaling.py --device cuda)
	$(call note,omniglot_20w1s,$(MAKE) reproduce ROW=omniglot_20w1s_maml SEEDS=0 ITERATIONS=60000)
	$(call note,omniglot_5w1s,$(MAKE) reproduce ROW=omniglot_5w1s_maml SEEDS=0 ITERATIONS=60000)
	@test ! -e build/gpu/failed || (echo "These failed; their files in build/gpu say why:"; cat build/gpu/failed; exit 1)

# $(call note,NAME,COMMAND): run it, note what it prints, and go on if it fails.
note = { $(2) || echo $(1) >> build/gpu/failed; } 2>&1 | tee build/gpu/$(1).md

# learn2learn 0.2.0, which tests compare with. Its C files were generated for Pythons before 3.11, so they are generated anew from their
# sources. Of its dependencies qpth, which its MAML and ANIL do not use, is left out: it would bring back numpy 1.
learn2learn: .venv/installed
	rm -rf build/learn2learn
	$(BIN)/python -m pip install --quiet "cython>=3.0,<3.1" setuptools wheel gym scipy requests
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: --dest build/learn2learn learn2learn==0.2.0
	tar xzf build/learn2learn/learn2learn-0.2.0.tar.gz -C build/learn2learn
	rm -r build/learn2learn/learn2learn-0.2.0/tests build/learn2learn/learn2learn-0.2.0/learn2learn/data/*.c
	$(BIN)/cython -3 build/learn2learn/learn2learn-0.2.0/learn2learn/data/*.pyx
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./build/learn2learn/learn2learn-0.2.0

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # 25.1: the first that installs dependency groups
	$(BIN)/python -m pip install --editable .
	touch $@

.venv/dev-installed: .venv/installed
	$(BIN)/python -m pip install --editable . --group dev
	touch $@

.venv/docs-installed: .venv/dev-installed
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs

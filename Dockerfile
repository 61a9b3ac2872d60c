# The NeMo container with mbridge_prune on top: Megatron-Bridge, Megatron-core, Transformer Engine
# and mamba_ssm are the container's own and stay as they are.
#
#   docker build -t mbridge-prune .
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD/models:/models" mbridge-prune \
#       torchrun --nproc-per-node 8 launch/prune.py --pp 8 --hf-path /models/parent ...
#
# The entry point is the base image's (its banner, then the command that is given); the default command prints
# prune.py's help. launch/slurm/ runs the same image under pyxis: IMAGE=... sbatch launch/slurm/prune.sbatch.
# The tag names one release; to pin its bytes as well, --build-arg BASE_IMAGE=nvcr.io/nvidia/nemo@sha256:...
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:26.02
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="mbridge-prune" \
      org.opencontainers.image.description="Structured pruning of large language models as a Megatron-Bridge plugin" \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /opt/mbridge_prune
COPY pyproject.toml README.md LICENSE ./
COPY docker ./docker
COPY mbridge_prune ./mbridge_prune
COPY launch ./launch
COPY configs ./configs
# Keeps every version of the container; HOME is for whatever user the container is run as.
RUN python docker/install.py && mkdir -m 1777 /home/work
ENV HOME=/home/work

# Nothing of the image is written at run time: outputs go to what is mounted.
USER 1000:1000
CMD ["python", "launch/prune.py", "--help"]

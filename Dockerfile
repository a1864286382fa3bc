# megatron-tst on NVIDIA's PyTorch container, which brings torch and Transformer Engine: 26.08 has the torch
# that is tested here (2.14, with Triton 3.8 and CUDA 13.4), and Megatron-Bridge, which trains with
# megatron-core, is tested in it. docs/cluster.md says which steps have been tried.
FROM nvcr.io/nvidia/pytorch:26.08-py3

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron-tst

# What the container has stays as it is; the rest gets the tested versions of constraints.txt. Before
# the sources, so that a change of them does not install everything again.
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY scripts/container.py scripts/
COPY megatron_tst/__init__.py megatron_tst/
# /opt/constraints.txt has each package of the container as it is, so that the container's own file of
# constraints (PIP_CONSTRAINT) could only contradict it.
RUN export PIP_CONSTRAINT="" \
    && pip list --format freeze > /opt/container.txt \
    && python scripts/container.py constraints /opt/container.txt constraints.txt \
        > /opt/constraints.txt \
    && pip install --no-cache-dir --constraint /opt/constraints.txt '.[megatron,data,eval,fast]' \
    && pip uninstall --yes megatron-tst

COPY . .
RUN export PIP_CONSTRAINT="" \
    && pip install --no-cache-dir --no-deps --editable . \
    && python scripts/container.py check /opt/container.txt

# Jobs of Kubernetes and Base Command run as this user; Slurm's containers as the one who submits.
RUN useradd --create-home --uid 10001 tst
USER 10001
CMD ["bash"]

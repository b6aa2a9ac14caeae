# Two images from one file: VARIANT=cuda (torch with its CUDA libraries) and VARIANT=cpu. Build with docker, podman or
# buildah (--format docker, which HEALTHCHECK needs). Optional secrets for sites with their own package index:
# --secret id=pip.conf,src=... and --secret id=ca.pem,src=...; neither gets into a layer.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim@sha256:4724b8cc51e33e398f0e2e15e18d5ec2851ff0c2280647e1310bc1642182655d
# An image with the CUDA toolkit in /usr/local/cuda-${CUDA_VERSION}, such as docker.io/nvidia/cuda:13.0.2-devel-ubuntu22.04
# at a digest. The default has none: the compiler then comes as wheels with hashes.
ARG CUDA_IMAGE=${BASE_IMAGE}

FROM ${CUDA_IMAGE} AS cuda
FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Python 3.11 of Debian 12, an init, and InfiniBand's user space. Security fixes younger than the pinned base go in too.
# hadolint ignore=DL3008
RUN apt-get update -q \
    && apt-get upgrade -yq \
    && apt-get install -yq --no-install-recommends \
        ca-certificates ibverbs-providers libibverbs1 librdmacm1 python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS builder
# hadolint ignore=DL3008
RUN apt-get update -q \
    && apt-get install -yq --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY .docker/lock/build.txt /lock/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.pem,target=/run/ca.pem,required=false \
    python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install -q --require-hashes -r /lock/build.txt

# The Python packages that both variants and every commit share: the large layer.
FROM builder AS packages
ARG VARIANT=cuda
# Where the torch of the variant cpu is: https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX=
COPY .docker/lock/common.txt .docker/lock/${VARIANT}.txt /lock/
# Wheels first, because a package that comes as source is built with the locked tools and not with what pip fetches.
# compileall's code is not asked for: some packages ship templates that are no Python.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.pem,target=/run/ca.pem,required=false \
    /opt/tools/bin/pip wheel -q --no-deps --no-build-isolation --require-hashes --wheel-dir /wheels \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r /lock/common.txt -r "/lock/${VARIANT}.txt" \
    && python3 -m venv --without-pip /opt/venv \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install -q --no-deps --no-index --no-compile /wheels/*.whl \
    && rm -rf /wheels \
    && { /opt/tools/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib > /dev/null || true; }

# The CUDA compiler, in /usr/local/cuda. NVIDIA's wheels lack two of the names that compilers look for.
FROM builder AS toolkit
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG VARIANT=cuda
ARG CUDA_VERSION=13.0
COPY .docker/lock/nvcc.txt /lock/
COPY --from=cuda /usr/local /image
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.pem,target=/run/ca.pem,required=false \
    mkdir /usr/local/cuda \
    && if [ -d "/image/cuda-${CUDA_VERSION}" ]; then \
        mv "/image/cuda-${CUDA_VERSION}"/* /usr/local/cuda; \
    elif [ "${VARIANT}" = cuda ]; then \
        /opt/tools/bin/pip install -q --require-hashes --target /wheels -r /lock/nvcc.txt; \
        mv /wheels/nvidia/cu13/* /usr/local/cuda; \
        ln -s lib /usr/local/cuda/lib64; \
        ln -s "libcudart.so.${CUDA_VERSION%%.*}" /usr/local/cuda/lib/libcudart.so; \
    fi

# The WKV libraries with their manifests. Only their sources are copied: other changes leave them as they are.
FROM builder AS kernels
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG VARIANT=cuda
ARG CUDA_ARCHITECTURES="80 86 89 90 100 120"
COPY --from=toolkit /usr/local/cuda /usr/local/cuda
COPY kernels/build.py /src/
COPY kernels/csrc /src/csrc
RUN /opt/tools/bin/python /src/build.py cpu --output /opt/kernels \
    && if [ "${VARIANT}" = cuda ]; then \
        echo "${CUDA_ARCHITECTURES}" | xargs /opt/tools/bin/python /src/build.py cuda --output /opt/kernels --arch; \
    fi

# DeepSpeed's fused optimizers, which DeepSpeed would compile where they are first used.
FROM packages AS optimizers
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG VARIANT=cuda
ARG CUDA_ARCHITECTURES="80 86 89 90 100 120"
WORKDIR /src
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca.pem,target=/run/ca.pem,required=false \
    grep '^deepspeed==' /lock/common.txt > /lock/deepspeed.txt \
    && /opt/tools/bin/pip download -q --no-deps --no-build-isolation --no-binary :all: --require-hashes \
        --dest /lock -r /lock/deepspeed.txt \
    && tar -xzf /lock/deepspeed-*.tar.gz --strip-components=1
COPY --from=toolkit /usr/local/cuda /usr/local/cuda
COPY .docker/optimizers.py /lock/
RUN export CUDA_HOME=/usr/local/cuda PATH="/opt/tools/bin:${PATH}" \
    && PYTHONPATH=$(echo /opt/tools/lib/python3*/site-packages) && export PYTHONPATH \
    && echo "${CUDA_ARCHITECTURES}" \
        | xargs /opt/venv/bin/python /lock/optimizers.py /opt/optimizers "${VARIANT}" \
    && /opt/tools/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/optimizers

FROM builder AS package
COPY pyproject.toml README.md LICENSE /src/
COPY rwkv_cluster /src/rwkv_cluster
COPY launch /src/launch
COPY configs /src/configs
COPY kernels /src/kernels
# No C++ compiler: the WKV libraries come from the stage above, and the wheel need not build them at every change.
RUN CXX=none /opt/tools/bin/pip wheel -q --no-deps --no-build-isolation --no-index --wheel-dir /wheels /src \
    && python3 -m venv --without-pip /opt/venv \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install -q --no-deps --no-index --no-compile /wheels/*.whl \
    && /opt/tools/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib

FROM base AS runtime
# For any uid, with or without the entry point: apptainer and pyxis start their own command.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
    HOME=/tmp \
    USER=rwkv \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    TINI_SUBREAPER=1 \
    RWKV_CLUSTER_KERNELS=/opt/kernels \
    RWKV_CLUSTER_IMAGE=/opt/image/contents.json
# enroot starts a login shell, whose profile sets PATH anew.
RUN useradd --uid 1000 --no-create-home --home-dir /tmp --shell /bin/bash rwkv \
    && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh \
    && mkdir -m 1777 /work \
    && mkdir /opt/image
COPY --from=packages /opt/venv /opt/venv
COPY --from=optimizers /opt/optimizers /opt/venv
COPY --from=kernels /opt/kernels /opt/kernels
COPY .docker/entry /opt/image/entry
COPY --from=package /opt/venv /opt/venv
ARG VARIANT=cuda
ARG REVISION=unknown
RUN --mount=type=bind,source=.docker/contents.py,target=/tmp/contents.py \
    python3 /tmp/contents.py /opt/image "${REVISION}" "${VARIANT}"
ARG VERSION=0.1.0
ARG TORCH_VERSION=2.13.0
ARG CUDA_VERSION=13.0
ARG CUDA_ARCHITECTURES="80 86 89 90 100 120"
# GPUs are for the image that has code for them. No MELLANOX_VISIBLE_DEVICES: enroot then fails where no InfiniBand is.
ENV NVIDIA_VISIBLE_DEVICES=${CUDA_ARCHITECTURES:+all} \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
LABEL org.opencontainers.image.title="rwkv-cluster" \
    org.opencontainers.image.description="Train RWKV-5, RWKV-6 and RWKV-7 from one YAML file" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    rwkv-cluster.variant="${VARIANT}" \
    rwkv-cluster.torch="${TORCH_VERSION}" \
    rwkv-cluster.cuda="${CUDA_VERSION}" \
    rwkv-cluster.architectures="${CUDA_ARCHITECTURES}"
USER 1000:1000
# A work directory such as work/quickstart is then in /work.
WORKDIR /
# It runs every kernel, so seldom.
HEALTHCHECK --interval=1h --timeout=2m --start-period=2m CMD ["rwkv-cluster", "doctor"]
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/image/entry"]
CMD ["doctor"]

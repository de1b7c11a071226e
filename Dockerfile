# Kata Lab for JupyterHub, or by itself; the development container builds on it too. For a Debian base that has Python
# 3.11 or newer as its own; its APT says where guests' packages are.
#
#   docker build -t kata-lab .
#   docker run --rm -p 127.0.0.1:8888:8888 kata-lab     (JupyterLab by itself; its first lines say the address)
#   c.DockerSpawner.image = "kata-lab"                  (in JupyterHub's configuration; Kubernetes: singleuser.image)
#
# A user is not root, and needs 2 GB and one CPU; no privileges, no devices, no network.

ARG BASE=debian:trixie-slim
FROM ${BASE}

ARG EXTRA=
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates debian-archive-keyring e2fsprogs passt python3 python3-venv ${EXTRA} \
    && rm -rf /var/lib/apt/lists/*

ARG NB_UID=1000
RUN useradd --create-home --uid "${NB_UID}" --shell /bin/bash jovyan \
    && install -d -o jovyan -g jovyan /opt/kata-lab

# A hub mounts a volume over the home directory: what is baked in lies elsewhere. Code for every CPU of the architecture,
# since hubs build on one machine and run on others.
ENV PATH=/opt/kata-lab/environment/bin:$PATH \
    XDG_CACHE_HOME=/opt/kata-lab/cache \
    KATA_LAB_CPU=generic \
    PIP_DISABLE_PIP_VERSION_CHECK=1

USER jovyan
ARG JUPYTERHUB=jupyterhub>=4,<6
COPY --chown=jovyan . /tmp/kata-lab
RUN python3 -m venv /opt/kata-lab/environment \
    && pip install --no-cache-dir "/tmp/kata-lab[lab]" "${JUPYTERHUB}" \
    && install -m 755 /tmp/kata-lab/binder/serve /opt/kata-lab/environment/bin/kata-lab-serve \
    && rm -rf /tmp/kata-lab

RUN KATA_LAB_PROGRESS=lines kata-lab lab prepare && kata-lab doctor

WORKDIR /home/jovyan
EXPOSE 8888
CMD ["kata-lab-serve"]

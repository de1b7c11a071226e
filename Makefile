# Kata Lab: make demo boots a machine and runs a container, make test runs all tests, make lab opens the notebooks.
# For Debian 12 and newer and Ubuntu 24.04 and newer. Python packages go to .venv, from where pip is configured to fetch.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help demo test lab clean system-demo system-test

VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A virtual environment whose Python went away, or that was moved, is made anew.
$(shell $(BIN)/python -c 'import sys; sys.exit(sys.prefix != sys.argv[1])' "$$PWD/$(VENV)" 2>/dev/null || rm -f $(VENV)/.made)

# need <package> <why> <command>...: notes a package unless the command succeeds. A package a|b is the first that APT has.
# install_needed: installs what was noted, as root or with sudo.
define INSTALL
step() { printf '\n== %s\n' "$$*"; }
packages=()
need() {
    local package=$$1 why=$$2; shift 2
    "$$@" >/dev/null 2>&1 || { packages+=("$$package"); echo "make: $$package is needed: $$why"; }
}
install_needed() {
    local sudo= each chosen=()
    [ $${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || { echo "make: this machine has no APT to install $${packages[*]} with" >&2; exit 1; }
    if [ "$$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || { echo "make: have $${packages[*]} installed, since you are not root" >&2; exit 1; }
        sudo=sudo
    fi
    step "Installing $${packages[*]} with APT"
    $$sudo apt-get -q update </dev/null
    for each in "$${packages[@]}"; do
        if apt-cache show "$${each%|*}" >/dev/null 2>&1; then chosen+=("$${each%|*}"); else chosen+=("$${each#*|}"); fi
    done
    $$sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "$${chosen[@]}" </dev/null
}
endef

# suitable <python>: whether it is new enough and complete enough to make a virtual environment.
define PYTHON
suitable() {
    "$$1" -c 'import sys, venv, ensurepip, ctypes, lzma, ssl, zlib; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}
have_python() { [ -n "$$(find_python)" ]; }
find_python() {
    local each
    for each in $${PYTHON:-} python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
        if suitable "$$each"; then echo "$$each"; return; fi
    done
}
endef

help:
	echo 'make demo   installs what is needed, boots a Debian kernel in a Python process, and runs a container in a sandbox'
	echo 'make test   installs what the tests need, and runs all checks and tests'
	echo 'make lab    opens the notebooks in JupyterLab'
	echo 'make clean  removes the virtual environment and what tools left behind'

demo: system-demo $(VENV)/.demo
	$(INSTALL)
	[ -t 2 ] || export KATA_LAB_PROGRESS=lines
	step 'What this machine can do (kata-lab doctor)'
	$(BIN)/kata-lab doctor
	step 'Booting a Debian kernel in a Python process (kata-lab boot); the first time it is fetched and the CPU compiled'
	$(BIN)/kata-lab boot --trace --run 'uname -a' </dev/null
	step 'Building the guest of sandboxes, unless that was done (kata-lab image build lifsea)'
	$(BIN)/kata-lab image build lifsea
	step 'Running a container in a sandbox of its own (kata-lab run --rm busybox uname -a)'
	$(BIN)/kata-lab run --rm busybox uname -a </dev/null
	step 'What such a start consists of (kata-lab run --detach, kata-lab timeline)'
	container=$$($(BIN)/kata-lab run --detach busybox sleep 600 </dev/null)
	trap '$(BIN)/kata-lab rm --force "$$container" >/dev/null' EXIT
	$(BIN)/kata-lab timeline "$$container"

test: system-test $(VENV)/.test
	$(INSTALL)
	export KATA_LAB_PROGRESS=lines
	step 'Checking the style (ruff check, ruff format)'
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	step 'Checking the types (mypy)'
	$(BIN)/mypy
	step 'Building the boot guest and compiling the CPU, unless that was done (kata-lab boot)'
	$(BIN)/kata-lab boot --run true </dev/null >/dev/null
	step 'Running the notebooks (pytest --nbval-lax notebooks)'
	$(BIN)/pytest -q --nbval-lax --nbval-current-env -W default notebooks </dev/null
	step 'Running the tests (pytest)'
	$(BIN)/pytest </dev/null

lab: system-demo $(VENV)/.lab
	[ "$$(id -u)" != 0 ] || set -- --allow-root
	exec $(BIN)/jupyter lab "$$@" notebooks

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

system-demo:
	$(INSTALL)
	$(PYTHON)
	need python3 'the lab is written in Python' have_python
	need python3-venv 'its packages go to $(VENV)' have_python
	need debian-archive-keyring 'its keys sign the packages of the guest' ls /usr/share/keyrings/debian-archive-keyring.*
	need e2fsprogs 'makes the disks of sandboxes' env PATH="$$PATH:/usr/sbin:/sbin" sh -c 'command -v mke2fs'
	install_needed
	have_python || { echo 'make: Python 3.11 or newer is needed: name one with make PYTHON=...' >&2; exit 1; }

system-test: system-demo
	$(INSTALL)
	need 'qemu-system-riscv|qemu-system-misc' 'a referee of CPU and devices' command -v qemu-system-riscv64
	need qemu-system-x86 'hotplug through ACPI, to compare with' command -v qemu-system-x86_64
	need 'virtiofsd|qemu-system-common' 'shares directories with that' sh -c 'test -x /usr/libexec/virtiofsd || test -x /usr/lib/qemu/virtiofsd'
	need qemu-user-static 'a referee of floating point' command -v qemu-riscv64-static
	need device-tree-compiler 'a referee of the device tree' command -v dtc
	need cpio 'a referee of the initramfs' command -v cpio
	need gnupg 'signs the archives that the tests make' command -v gpg
	need dpkg 'makes the packages that the tests read' command -v dpkg-deb
	need util-linux 'runs a test as somebody else than root' command -v setpriv
	need erofs-utils 'makes and checks read-only disk roots' env PATH="$$PATH:/usr/sbin:/sbin" sh -c 'command -v mkfs.erofs fsck.erofs'
	need passt 'is the network of guests' command -v passt
	need iperf3 'measures the network of guests' command -v iperf3
	need e2fsprogs 'checks ext4 disk roots' env PATH="$$PATH:/usr/sbin:/sbin" sh -c 'command -v mke2fs e2fsck'
	need skopeo 'reads, writes and copies images, a referee of ours' command -v skopeo
	need umoci 'unpacks images, a referee of ours' command -v umoci
	need crun 'runs bundles, a referee of ours' command -v crun
	need busybox-static 'is the programs of those bundles' command -v busybox
	need chromium 'shows the notebooks, to look at what a person sees' command -v chromium
	install_needed

$(VENV)/.made: | system-demo
	$(INSTALL)
	$(PYTHON)
	python=$$(find_python)
	step "Making $(VENV) with $$($$python -V)"
	rm -rf $(VENV)
	"$$python" -m venv $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.made
	$(INSTALL)
	step 'Installing Kata Lab and the Python packages it uses into $(VENV) (pip install -e .)'
	$(BIN)/python -m pip install -q -e . </dev/null
	touch $@

$(VENV)/.lab: pyproject.toml $(VENV)/.made
	$(INSTALL)
	step 'Installing JupyterLab into $(VENV) (pip install -e .[lab])'
	$(BIN)/python -m pip install -q -e '.[lab]' </dev/null
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.made
	$(INSTALL)
	step 'Installing what the tests use into $(VENV) (pip install -e .[test])'
	$(BIN)/python -m pip install -q -e '.[test]' </dev/null
	touch $@

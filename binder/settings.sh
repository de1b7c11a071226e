# What postBuild and start set: the CPU that guests' code is compiled for, and Debian's mirror.

export KATA_LAB_CPU=generic # Binder builds on one kind of machine and runs on others

# Ubuntu's APT names no Debian archive; python-apt-common knows where Debian says it is.
known=/usr/share/python-apt/templates/Debian.info
if [ -z "${KATA_LAB_MIRROR:-}" ] && grep -qs '^ID=ubuntu' /etc/os-release && [ -r "$known" ]; then
    KATA_LAB_MIRROR=$(sed -n 's/^BaseURI: //p' "$known" | head -n 1)
    export KATA_LAB_MIRROR
fi

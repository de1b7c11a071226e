"""What other machines are set up from: Binder's files, the Dockerfile, the development container. Followed by hand as
docs/install.md tells; here, what can be judged without an engine for containers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).parents[3]
BINDER = TOP / "binder"


def dockerfile() -> str:
    """With its comments and broken lines taken away."""
    lines = [line for line in (TOP / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def started(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [BINDER / "start", *command], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_binders_start_runs_what_it_is_given_with_the_settings_of_the_build() -> None:
    assert started("sh", "-c", 'echo "$KATA_LAB_CPU $1"', "sh", "two words") == "generic two words"
    assert started("sh", "-c", "echo $KATA_LAB_MIRROR", KATA_LAB_MIRROR="file:///mine") == "file:///mine"
    assert "settings.sh" in (BINDER / "postBuild").read_text()


def test_binders_packages_are_those_of_the_project() -> None:
    (line,) = (BINDER / "requirements.txt").read_text().splitlines()
    extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {line.partition("#")[0].strip() for line in (BINDER / "apt.txt").read_text().splitlines()}

    assert line == "-e .[lab]"
    assert "lab" in extras
    assert {"debian-archive-keyring", "e2fsprogs"} < wanted
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", each) for each in wanted)  # what repo2docker takes for a package
    assert re.fullmatch(r"python-3\.1[1-9]", (BINDER / "runtime.txt").read_text().strip())


@pytest.mark.parametrize("name", ["postBuild", "start", "serve"])
def test_programs_can_be_run_and_read_by_the_shell(name: str) -> None:
    assert os.access(BINDER / name, os.X_OK)
    subprocess.run(["bash", "-n", BINDER / name], check=True)


def test_the_containers_image_has_what_it_names_and_ends_as_a_user_who_is_not_root() -> None:
    text = dockerfile()
    named = re.findall(r"/tmp/kata-lab/(\S+)", text)

    assert named == ["binder/serve"]
    assert all((TOP / each).exists() for each in named)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["jovyan"]
    assert text.rstrip().endswith('CMD ["kata-lab-serve"]')
    left_out = (TOP / ".dockerignore").read_text().split()
    assert not {"README.md", "LICENSE", "pyproject.toml", "vmm", "kata_lab", "images", "notebooks"} & set(left_out)


def test_the_development_container_is_made_of_the_same_image() -> None:
    text = (TOP / ".devcontainer" / "devcontainer.json").read_text()
    plain = json.loads("\n".join(line for line in text.splitlines() if not line.startswith("//")))

    assert (TOP / ".devcontainer" / plain["build"]["dockerfile"]).samefile(TOP / "Dockerfile")
    assert (TOP / ".devcontainer" / plain["build"]["context"]).samefile(TOP)
    assert all(f"ARG {name}=" in dockerfile() for name in plain["build"]["args"])
    assert plain["remoteUser"] in dockerfile()
    assert shlex.split(plain["postCreateCommand"])[:3] == ["pip", "install", "--editable"]


def test_the_course_is_put_beside_what_a_learner_has_when_the_container_starts(tmp_path: Path) -> None:
    for name in ("jupyter", "jupyterhub-singleuser"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0") in $(basename "$PWD"): $*"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "kata-lab").write_text('#!/bin/sh\nmkdir -p "$3"\n')
    (tmp_path / "kata-lab").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    told = []
    for token in ("", "secret"):
        environment = os.environ | {"HOME": str(tmp_path), "PATH": path, "JUPYTERHUB_API_TOKEN": token}
        command = [BINDER / "serve", "--port=1"]
        told.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())

    assert told == [
        "jupyter in kata-lab-course: lab --ip=0.0.0.0 --no-browser --port=1",
        "jupyterhub-singleuser in kata-lab-course: --port=1",
    ]

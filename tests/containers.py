# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles read as lists of instructions, and replayed without a container engine."""

import fnmatch
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"


@dataclass
class Stage:
    """One stage: its base image and its instructions, (keyword, arguments) in their order."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def of(self, keyword: str) -> list[str]:
        """Return the arguments of all instructions of one kind."""
        return [arguments for found, arguments in self.instructions if found == keyword]

    def environment(self) -> dict[str, str]:
        """Return what its ENV instructions set."""
        return dict(word.split("=", 1) for line in self.of("ENV") for word in shlex.split(line))


def read_dockerfile(path: Path) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by their names."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, arguments = line.split(None, 1)
        if keyword == "FROM":
            base, _, name = arguments.split()
            stages[name] = Stage(base)
        else:
            list(stages.values())[-1].instructions.append((keyword, arguments.strip()))
    return stages


def context() -> set[str]:
    """Return the tracked files that Dockerfile.dockerignore lets into the build; a later line overrules an earlier."""
    rules = [line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    found = set()
    for name in listed.stdout.decode().splitlines():
        parts = Path(name).parts
        folders = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        kept = True
        for rule in rules:
            if any(fnmatch.fnmatchcase(each, rule.lstrip("!")) for each in folders):
                kept = rule.startswith("!")
        if kept:
            found.add(name)
    return found


class Replay:
    """Stages run, instruction by instruction, in an overlay over this machine's own files; nothing outside changes.

    A new virtual environment stands for the base image's Python. It needs root, for mounts and for other users.
    """

    def __init__(self, folder: Path, arguments: dict[str, str]):
        self.root = folder / "root"
        layers = [folder / name for name in ("root", "changes", "work")]
        for layer in layers:
            layer.mkdir()
        options = f"lowerdir=/,upperdir={layers[1]},workdir={layers[2]}"
        self.lines = ["set -euo pipefail", f"mount -t overlay overlay -o {options} {self.root}"]
        self.lines += [f"mount --rbind /{name} {self.root}/{name}" for name in ("proc", "dev", "sys")]
        self.arguments = arguments
        self.user = "0"
        self.environment: dict[str, str] = {}
        self.where = "/"

    def start(self, name: str) -> None:
        """Begin a stage from its base image."""
        own = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key == "SSL_CERT_FILE"}
        self.user, self.where = "0", "/"
        self.environment = {**own, "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"}
        python = Path(sys.executable).resolve()
        self.run("chmod a+rx " + " ".join(str(folder) for folder in python.parents))  # for users other than root
        self.run(f"{python} -m venv /opt/replayed-{name}")
        self.environment["PATH"] = f"/opt/replayed-{name}/bin:" + self.environment["PATH"]

    def run(self, command: str, user: str | None = None) -> None:
        """Add a command, as /bin/sh runs it inside."""
        words = [f"{key}={value}" for key, value in self.environment.items()]
        inside = f"cd {self.where} && {command}"
        user = user or self.user
        self.lines.append(
            shlex.join(
                ["chroot", f"--userspec={user}:{user}", str(self.root), "env", "-i", *words, "/bin/sh", "-c", inside]
            )
        )

    def stage(self, name: str, stage: Stage) -> None:
        """Add all instructions of a stage."""
        self.start(name)
        for keyword, arguments in stage.instructions:
            getattr(self, f"_{keyword.lower()}", lambda _: None)(arguments)

    def _run(self, arguments: str) -> None:
        words = arguments.split()
        self.run(" ".join(word for word in words if not word.startswith("--mount=")))

    def _copy(self, arguments: str) -> None:
        *sources, target = arguments.split()
        kept = context()
        for source in sources:
            folder = ROOT / source if (ROOT / source).is_dir() else (ROOT / source).parent
            files = sorted(name for name in kept if name == source or name.startswith(f"{source}/"))
            assert files, f"COPY {source}: the build's context has no such file"
            for name in files:
                place = f"{self.root}{os.path.join(self.where, target, (ROOT / name).relative_to(folder))}"
                self.lines.append(shlex.join(["install", "-D", "-m", "644", str(ROOT / name), place]))

    def _workdir(self, arguments: str) -> None:
        self.where = arguments
        self.lines.append(f"mkdir -p {self.root}{arguments}")

    def _env(self, arguments: str) -> None:
        self.environment |= dict(word.split("=", 1) for word in shlex.split(arguments))

    def _arg(self, arguments: str) -> None:
        name, _, default = arguments.partition("=")
        self.environment[name] = self.arguments.get(name, default)

    def _user(self, arguments: str) -> None:
        self.user = arguments

    def finish(self) -> str:
        """Run it all; return what it printed."""
        command = ["unshare", "--mount", "bash", "-c", "\n".join(self.lines)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

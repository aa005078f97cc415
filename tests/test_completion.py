# SPDX-License-Identifier: Apache-2.0
"""`megacell completion`: what a shell offers after the script it prints has been read."""

import shlex
import shutil
import subprocess

import pytest
from runs import here

BASH = """\
source {script}
compopt() {{ :; }}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_megacell
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """\
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PROMPT=; fpath=({folder} $fpath); autoload -U compinit; compinit -u -D'
sleep 1
zpty -w -n shell $'megacell {line}\\t\\t'
sleep 2
zpty -r -t shell found '*'
while zpty -r -t shell more; do found+=$more; done
print -r -- "$found"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The folder of both scripts."""
    folder = tmp_path_factory.mktemp("completion")
    for shell, name in (("bash", "megacell.bash"), ("zsh", "_megacell")):
        code, out, err = here("completion", shell)
        assert (code, err) == (0, "")
        (folder / name).write_text(out)
    return folder


def offered(scripts, *words: str) -> set[str]:
    """Return what bash offers; it cuts words at "="."""
    text = BASH.format(script=scripts / "megacell.bash", words=shlex.join(["megacell", *words]))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True, cwd=scripts)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "some"),
    [
        pytest.param(["pre"], {"pretrain"}, id="a command by its beginning"),
        pytest.param(["vocabulary", ""], {"build", "merge", "import", "fetch"}, id="the actions of a command"),
        pytest.param(["doctor", "--q"], {"--quick"}, id="an option"),
        pytest.param(["embed", "model.nemo", "x", "--pool", "m"], {"mean"}, id="a choice"),
        pytest.param(["info", "mega"], {"megacell.bash"}, id="a file"),
        pytest.param(["pretrain", "optim.sch"], {"optim.schedule="}, id="a Hydra option"),
        pytest.param(["pretrain", "model", "="], {"tiny", "geneformer_10m"}, id="a Hydra group"),
        pytest.param(["pretrain", "optim.schedule", "=", "lin"], {"linear"}, id="a Hydra choice"),
        pytest.param(["pretrain", "resume", "=", ""], {"true", "false"}, id="yes or no"),
        pytest.param(["pretrain", "store", "=", "mega"], {"megacell.bash"}, id="a file as a Hydra value"),
    ],
)
def test_bash_completes(words, some, scripts):
    found = offered(scripts, *words)
    assert some <= found
    assert all(each.startswith(words[-1].strip("=")) for each in found)


def test_every_command_and_every_option_of_a_training_is_offered(scripts):
    from megacell.core.cli.main import build_parser

    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    assert offered(scripts, "") == set(commands.choices)
    names = offered(scripts, "pretrain", "")
    assert {"store=", "batch.cells=", "data.masking.rate=", "logger=", "experiment="} <= names
    code, out, _ = here("pretrain", "--cfg", "store=a", "vocabulary=b", "out=c")
    assert code == 0
    plain = {
        line.removesuffix(": null").split(": ")[0] for line in out.splitlines() if line[0] != " " and line[-1] != ":"
    }
    assert {f"{name}=" for name in plain} <= names


@pytest.mark.exhaustive
@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh here")
@pytest.mark.parametrize(
    ("line", "some"),
    [("pretrain model=", "geneformer_10m"), ("vocabulary ", "fetch"), ("pretrain optim.sch", "optim.schedule=")],
)
def test_zsh_completes(line, some, scripts):
    text = ZSH.format(folder=scripts, line=line)
    done = subprocess.run(["zsh", "-f", "-c", text], capture_output=True, text=True, timeout=60)
    assert some in done.stdout

# SPDX-License-Identifier: Apache-2.0
"""The documentation: it builds without a warning, what it shows is so, and its commands and notebooks run."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import docs_ground
import nbformat
import pytest
import shown
import yaml

import megacell.geneformer
import megacell.store
from megacell.core.errors import MegacellError
from megacell.training.family import find_family

DOCS = shown.ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = [DOCS / "notebooks" / f"{name}.ipynb" for name in ("pretrain-and-look", "embed-and-annotate")]
COMMANDS = [command for page in PAGES for command in shown.commands(page)]
GIB, GPUS = 2**30, (24, 40, 80, 141)

NOT_RUN = {  # commands that are parsed only, and why
    r"devices=8": "eight GPUs",
    r"^torchrun --nnodes": "two machines with eight GPUs each",
    r"^torchrun --nproc-per-node 8": "eight GPUs",
    r"--part |--finish": "sixteen machines",
    r"vocabulary fetch": "a network",
    r"Geneformer-V2-104M": "a published model, and a network for its dictionaries",
    r"bionemo-1\.nemo": "a published model; test_nemo_1.py opens one that is made",
    r"geneformer\.vocab": "BioNeMo's dictionaries; test_nemo_1.py imports some that are made",
}
FOREIGN = {"--ntasks=…", "--ntasks-per-node", "--shm-size", "--gpus", "--user"}  # options of srun and docker


LOADED = re.compile(r'(?:<(?:script|img|iframe)\b[^>]*?\bsrc|<link\b[^>]*?stylesheet[^>]*?\bhref)="([^"]+)"')
OPTION = re.compile(r"(\w+)\.[\w.]*\w(?==|$)")
SOURCE = re.compile(
    r"^(core|store|training|geneformer|megacell|sub-packages|tests|docs|benchmarks|docker)/[a-z_0-9./-]+$"
)
FILE = re.compile(r".*\.(csv|html|json|md|nemo|npy|parquet|pkl|py|safetensors|store|yaml)$")


def page_of(path: Path) -> str:
    return path.name


def test_the_site_is_built_without_a_warning(tmp_path):
    words = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "read",
        DOCS,
        tmp_path / "site",
    ]
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    pages = {path.relative_to(tmp_path / "site").with_suffix("") for path in (tmp_path / "site").rglob("*.html")}
    assert pages >= {path.relative_to(DOCS).with_suffix("") for path in (*PAGES, *NOTEBOOKS)}
    reference = (tmp_path / "site" / "api.html").read_text()
    for package in (megacell.store, megacell.geneformer):
        assert not [name for name in package.__all__ if f'id="{package.__name__}.{name}"' not in reference]
    loaded = {url for page in (tmp_path / "site").rglob("*.html") for url in LOADED.findall(page.read_text())}
    assert loaded
    assert not {url for url in loaded if "//" in url}  # it opens offline


# what is shown is so


@pytest.mark.parametrize("page", [*PAGES, shown.ROOT / "README.md"], ids=page_of)
def test_every_command_that_is_shown_is_one(page):
    for command in shown.commands(page):
        try:
            shown.check(command)
        except (SystemExit, MegacellError) as error:
            pytest.fail(f"{command}\n{error}")


@pytest.mark.parametrize("page", PAGES, ids=page_of)
def test_every_option_that_is_named_is_one(page):
    spans = shown.spans(page)
    assert not {s: words for s in spans if s.startswith("megacell ") and (words := shown.unknown(s))}
    flags = {span.split()[0] for span in spans if span.startswith("--")}
    assert (
        page.name == "coming-from-bionemo.md" or not flags - shown.options() - FOREIGN
    )  # its left column is BioNeMo's
    groups = {name.split(".")[0] for name in shown.settings() if "." in name}
    named = {m[0] for span in spans if (m := OPTION.match(span)) and m[1] in groups and not FILE.match(m[0])}
    assert not named - shown.settings()


@pytest.mark.parametrize(
    "page", [*PAGES, *(shown.ROOT / name for name in ("README.md", "CONTRIBUTING.md"))], ids=page_of
)
def test_every_file_that_is_named_is_there(page):
    roots = (shown.ROOT, *shown.ROOT.glob("sub-packages/*/src/megacell"), *shown.ROOT.glob("sub-packages/*/src"))
    named = {m[0] for span in shown.spans(page) if (m := SOURCE.match(span))}
    assert not [name for name in named if not any((root / name).exists() for root in roots)]


def test_there_are_commands_on_the_pages():
    assert len(COMMANDS) > 60
    assert len({command.page for command in COMMANDS}) > 8
    assert sum(bool(command.refused) for command in COMMANDS) == 2


def test_no_exemption_from_running_is_unused():
    assert not [pattern for pattern in NOT_RUN if not any(re.search(pattern, each.text) for each in COMMANDS)]
    assert sum(exempt(each) for each in COMMANDS) < len(COMMANDS) / 3


def exempt(command: shown.Shown) -> bool:
    return any(re.search(pattern, command.text) for pattern in NOT_RUN)


def test_the_table_of_memory_is_what_its_formulas_give():
    pages = [(DOCS / f"{name}.md").read_text() for name in ("pretraining", "batch-and-parallelism")]
    sizes, told = ({row[0].split("`")[1]: row for row in map(cells, text.splitlines()) if row} for text in pages)
    assert len(told) == 10
    for name, row in told.items():
        model = yaml.safe_load((find_family("geneformer").configs / "model" / f"{name}.yaml").read_text())
        millions, genes = re.match(r"([\d.]+) M, ([\d,]+)", sizes[name][5]).groups()
        parameters = float(millions) * 1e6
        held = [parameters / T * (2 + 4 + 12 / D) / GIB for T, D in ((1, 1), (1, 8), (2, 4))]
        token = model["layers"] * (18 * model["hidden"] + 4 * model["ffn"]) + 0.15 * int(genes.replace(",", "")) * 2
        room = [max(1.0, (0.7 * gpu * 1e9 - parameters * 18) / token) for gpu in GPUS]
        most = [min(131_072, 2 ** int(math.log2(tokens))) for tokens in room]
        fit = [f"{tokens:,}" if tokens >= 2048 else "—" for tokens in most]
        assert row[1:] == [*(f"{size:.2f}" for size in held), f"{token / 1000:,.0f}", *fit], name


def cells(line: str) -> list[str]:
    """Return the cells of a table's row about a published model; none of another line."""
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| `geneformer_") else []


def test_figures_of_the_demo_are_those_of_the_readme():
    readme = (shown.ROOT / "README.md").read_text()
    figures = re.findall(r"\d\.\d{3} nats|0\.\d\d ± 0\.\d\d", (DOCS / "what-it-is-not.md").read_text())
    assert len(figures) == 7
    assert not [figure for figure in figures if figure not in readme]


def result(name: str) -> dict:
    return json.loads((shown.ROOT / f"benchmarks/results/{name}.json").read_text())


def goals_of(section: str) -> list[str]:
    """Return a section's lines that tell if a goal was met."""
    text = (DOCS / "benchmarks.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return [line for line in text.splitlines() if line.endswith(("| met |", "| missed |"))]


def test_figures_of_the_store_are_those_that_were_measured():
    measured = ["| " + " | ".join(goal.values()) + " |" for part in result("store").values() for goal in part["goals"]]
    assert goals_of("The store's figures") == measured


def test_figures_of_training_are_those_that_were_measured():
    figures, scaling, times = result("train"), result("scaling"), result("training_steps")["times"].values()
    outside = figures["contenders"]["megacell, 24 cells, fp32"]["outside_the_engine"]
    found = [*(f"{each:.1f}" for each in times), scaling["goals"][0]["found"], f"{outside:.2%}".replace("%", " %")]
    shown_here = [[cell.strip() for cell in line.strip("|").split("|")] for line in goals_of("Training on a CPU")]
    assert [row[1] for row in shown_here] == found
    bounds = [float(re.search(r"[\d.]+", row[2])[0]) for row in shown_here]
    met = [float(one) >= bound for one, bound in zip(found[:-1], bounds, strict=False)] + [100 * outside < bounds[-1]]
    assert [row[3] for row in shown_here] == ["met" if each else "missed" for each in met]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page_of)
def test_a_notebook_shows_what_it_printed_and_nothing_of_the_machine(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {"display_data", "stream"} <= {output.output_type for output in outputs}
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    texts = json.dumps([{k: v for k, v in o.get("data", o).items() if "image" not in k} for o in outputs])
    assert not re.findall(r"/(?:home|work|tmp|root|usr|mnt)/|Warning", texts)


# the long runs


@pytest.mark.exhaustive
def test_the_notebooks_run_from_scratch(tmp_path):
    for path in NOTEBOOKS:  # the second goes on in the folder of the first
        shutil.copy(path, tmp_path)
        code, out, err = docs_ground.shell(f"jupyter-execute --timeout=900 {path.name}", tmp_path, 1200)
        assert code == 0, out + err


@pytest.fixture(scope="session")
def ground(data, tmp_path_factory) -> Path:
    """A folder with all that the pages' commands ask for; each page gets a copy."""
    folder = tmp_path_factory.mktemp("ground")
    docs_ground.lay_out(folder, data)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", [page for page in PAGES if shown.commands(page)], ids=page_of)
def test_the_commands_of_a_page_run_in_their_order(page, ground, tmp_path):
    folder = shutil.copytree(ground, tmp_path / "ground")
    for command in shown.commands(page):
        if exempt(command):
            continue
        docs_ground.clear_the_way(command.words, folder)
        text = " ".join([command.text, *docs_ground.shortened(command.words)])
        code, out, err = docs_ground.shell(text, folder)
        if command.refused:
            assert (code, err.strip()) == (1, command.refused)
        else:
            assert code == 0, f"{command}\n{text}\nexit code {code}\n{out}\n{err}"

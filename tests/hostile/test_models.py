# SPDX-License-Identifier: Apache-2.0
"""Models that somebody made to harm who opens them: .nemo files, Hugging Face directories, checkpoints.

Each is refused in one line, soon and in little memory, before a network is built; nothing of the environment is told.
"""

import io
import json
import shutil
from pathlib import Path

import models_made as made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from runs import fine, here, one_line

from megacell.core.errors import DataError, UsageError
from megacell.geneformer.model.config import ModelConfig
from megacell.geneformer.vocabulary.vocabulary import Vocabulary
from megacell.training.foreign.plain import check_shape, parse_yaml

ROWS = 50_000_000
HERE = Path(made.HERE)


def saved(state) -> bytes:
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def parquet(columns, **options) -> bytes:
    pq.write_table(pa.table(columns), buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def weights():
    return torch.load(io.BytesIO(made.members()[made.WEIGHTS]), weights_only=True)


def vocabulary_files(change) -> dict[str, bytes]:
    """Return an archive's files with another vocabulary inside, and its hash in the configuration left alone."""
    parts = made.members()
    folder = {name: content for name, content in parts.items() if name.startswith("./vocabulary/")}
    change(folder)
    return {**parts, **folder}


def coded(value: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [value])


def expanded(hidden: int) -> dict[str, bytes]:
    """Return an archive of a large network whose weights are one number each."""
    from megacell.geneformer.model.tensor_shapes import shapes_of

    parts = made.with_config(lambda c: c["network"].update(hidden=hidden, ffn=4 * hidden, layers=4, heads=2))
    network = ModelConfig.of(yaml.safe_load(parts[made.CONFIG])["network"])
    shapes = shapes_of(network, network.padded_vocabulary)
    state = {f"bert.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    return {**parts, made.WEIGHTS: saved(state)}


def shared() -> dict[str, bytes]:
    """Return an archive whose tensors all lie in the largest one."""
    state = weights()
    whole = torch.zeros(max(tensor.numel() for tensor in state.values()))
    views = {name: whole[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}
    return {**made.members(), made.WEIGHTS: saved(views)}


def anchors(factor: int, levels: int) -> bytes:
    lines = [f"a0: &a0 [{','.join('x' * factor)}]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * factor)}]" for i in range(1, levels)]
    return "\n".join(lines).encode()


def said(**changes):
    return made.with_config(lambda c: c["provenance"].update(changes))


def sized(**changes):
    return made.with_config(lambda c: c["network"].update(changes))


def token(value: int) -> dict[str, bytes]:
    genes = pq.read_table(io.BytesIO(made.members()[made.GENES])).to_pandas()
    genes.loc[0, "token"] = value
    schema = {"gene_id": pa.string(), "symbol": pa.string(), "token": pa.int32(), "median": pa.float64()}
    columns = {name: pa.array(genes[name], kind) for name, kind in schema.items()}
    return {**made.members(), made.GENES: parquet(columns)}


NAN = {name: tensor * float("nan") for name, tensor in weights().items()}
NEMO = {  # what: the files, and words of the refusal
    "nested anchors": ({**made.members(), made.CONFIG: anchors(9, 9)}, "anchors or aliases"),
    "nested anchors beside the network": (
        {**made.members(), made.CONFIG: made.members()[made.CONFIG] + anchors(8, 8)},
        "anchors or aliases",
    ),
    "400,000 keys": (
        {**made.members(), made.CONFIG: b"".join(b"k%d: 1\n" % i for i in range(400_000))},
        "which it cannot need",
    ),
    "60,000 keys": (
        {**made.members(), made.CONFIG: b"".join(b"k%d: 1\n" % i for i in range(60_000))},
        "more than 10,000 values",
    ),
    "lists 100,000 deep": ({**made.members(), made.CONFIG: b"a: " + b"[" * 100_000}, "nested more than 40 deep"),
    "a number in base 60": (
        {**made.members(), made.CONFIG: b"a: 1" + b":59" * 200_000},
        "a text of 600,001 characters",
    ),
    "a thousand million layers": (sized(layers=10**9), "layers=1000000000: must be a whole number from 1 to 1,000"),
    "a hidden size of 10^400": (sized(hidden=10**400), "must be a whole number"),
    "a hidden size of 2^20": (sized(hidden=1 << 20, ffn=1 << 20), "hidden=1048576"),
    "the largest network": (sized(hidden=1 << 16, ffn=1 << 18, layers=1000, heads=16), "missing for its"),
    "cells of 10^12 tokens": (sized(max_length=10**12), "max_length=1000000000000"),
    "layers that are true": (sized(layers=True), "layers=True"),
    "an epsilon that is infinite": (sized(layernorm_epsilon=float("inf")), "layernorm_epsilon=inf"),
    "a precision that there is not": (made.with_config(lambda c: c.update(precision="fp99")), "describes no network"),
    "a network that is a list": (made.with_config(lambda c: c.update(network=[1])), "describes no network"),
    "a vocabulary that is a number": (made.with_config(lambda c: c.update(vocabulary=5)), "describes no network"),
    "weights of stride 0": (expanded(4096), "larger than what is stored of it"),
    "weights that share what is stored": (shared(), "share what is stored so often"),
    "NaN": ({**made.members(), made.WEIGHTS: saved(NAN)}, "NaN"),
    "weights that are nowhere": (
        {**made.members(), made.WEIGHTS: saved({name: t.to("meta") for name, t in weights().items()})},
        "a tensor without values",
    ),
    "a parquet of 50 million rows": (
        {**made.members(), made.GENES: parquet({"gene_id": coded("G", ROWS), "symbol": coded("x", ROWS)})},
        "50,000,000 rows, 1,048,576 at most",
    ),
    "a parquet of a million long texts": (
        {
            **made.members(),
            made.GENES: parquet(
                {
                    "gene_id": coded("G" * 9000, 10**6),
                    "symbol": coded("x", 10**6),
                    "token": pa.array(np.zeros(10**6, np.int32)),
                    "median": pa.array(np.ones(10**6)),
                }
            ),
        },
        "9,000,000,000 bytes of text",
    ),
    "a parquet that unpacks a thousandfold": (
        {**made.members(), made.GENES: parquet({"gene_id": ["A" * 10**8]}, compression="zstd", use_dictionary=False)},
        "compressed by ZSTD",
    ),
    "a token of 2^31 - 1": (token(2**31 - 1), "a token of 1,048,576 or more"),
    "a vocabulary nested 200,000 deep": (
        vocabulary_files(lambda files: files.update({"./vocabulary/vocabulary.json": b"[" * 200_000})),
        "a broken vocabulary (it is nested",
    ),
    "specials that are texts": (
        vocabulary_files(
            lambda files: files.update(
                {
                    "./vocabulary/vocabulary.json": files["./vocabulary/vocabulary.json"].replace(
                        b'"pad": 0', b'"pad": "0"'
                    )
                }
            )
        ),
        "specials.pad is '0'",
    ),
    "another vocabulary": (
        vocabulary_files(
            lambda files: files.update(
                {"./vocabulary/vocabulary.json": files["./vocabulary/vocabulary.json"].replace(b'"tiny"', b'"tinz"')}
            )
        ),
        "has changed",
    ),
    "a variable of the environment": (said(step="${oc.env:SECRET_TOKEN}"), "is never resolved"),
    "one in a version": (said(versions={"torch": "${oc.env:SECRET_TOKEN}"}), "is never resolved"),
    "one in a name": (made.with_config(lambda c: c["provenance"].update({"${oc.env:SECRET_TOKEN}": 1})), "never resol"),
    "an interpolation of itself": (said(step="${provenance.step}"), "is never resolved"),
    "provenance that is a list": (made.with_config(lambda c: c.update(provenance=[1])), "what it says of its training"),
    "a step that is a text": (said(step="many"), "step is 'many'"),
    "a choice that is a number": (
        made.with_config(lambda c: c["provenance"]["data"]["choice"].update(where=5)),
        "data.choice.where is 5, where a text or nothing is expected",
    ),
    "a split of no kind": (
        made.with_config(lambda c: c["provenance"]["data"]["split"].update(more=1)),
        "what it says of its training",
    ),
    "a masking rate of 7": (
        made.with_config(lambda c: c["provenance"]["data"]["masking"].update(rate=7)),
        "what it says of its training",
    ),
}


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    """What came of each .nemo file, opened both ways."""
    folder = tmp_path_factory.mktemp("nemo")
    cases = []
    for number, (name, (parts, _)) in enumerate(NEMO.items()):
        path = made.write_nemo(folder / f"{number}.nemo", parts)
        cases += [(f"{name}, {way}", way, [path]) for way in ("open_model", "restore_from")]
    return made.open_all(cases, folder)


@pytest.mark.parametrize("way", ["open_model", "restore_from"])
@pytest.mark.parametrize("name", NEMO)
def test_a_nemo_file_is_refused(name, way, nemo):
    nemo[f"{name}, {way}"].assert_refused(NEMO[name][1])


def hugging_face(folder: Path) -> Path:
    """Export the model of an earlier version."""
    fine("export", made.MODEL, "--to", "hf", "--out", folder / "good")
    return folder / "good"


def config(path: Path, **changes) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DIRECTORIES = {
    "lists 200,000 deep": (lambda p: (p / "config.json").write_text("[" * 200_000), "cannot be read"),
    "2 MB": (lambda p: (p / "config.json").write_text(" " * (2 << 20)), "more than 1,048,576 bytes"),
    "a thousand million layers": (lambda p: config(p, num_hidden_layers=10**9), "layers=1000000000"),
    "a hidden size of 10^400": (lambda p: config(p, hidden_size=10**400), "model.hidden="),
    "an architecture of a megabyte": (lambda p: config(p, architectures=["x" * 10**6]), "architecture 'xxx"),
    "an activation that is a list": (lambda p: config(p, hidden_act=["gelu"]), "hidden_act is a list"),
    "an index that leads up": (
        lambda p: (p / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ".."}})),
        "names files outside of the folder",
    ),
    "an index 200,000 deep": (lambda p: (p / "model.safetensors.index.json").write_text("[" * 200_000), "nested"),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """What came of each Hugging Face directory."""
    folder = tmp_path_factory.mktemp("directories")
    good, cases = hugging_face(folder), []
    for number, (name, (change, _)) in enumerate(DIRECTORIES.items()):
        shutil.copytree(good, folder / str(number))
        change(folder / str(number))
        cases.append((name, "open_model", [folder / str(number)]))
    return made.open_all(cases, folder)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_is_refused(name, directories):
    directories[name].assert_refused(DIRECTORIES[name][1])


CHECKPOINTS = {
    "files that are a number": (lambda r: made.change_facts(r, lambda f: f.update(files=7)), "files is 7"),
    "files that are a list": (lambda r: made.change_facts(r, lambda f: f.update(files=[1])), "files is a list"),
    "a file elsewhere": (
        lambda r: made.change_facts(r, lambda f: f["files"].update({"../../config.yaml": [1, ""]})),
        "which is no file of the checkpoint",
    ),
    "facts that are a list": (
        lambda r: (made.checkpoint_of(r) / "checkpoint.json").write_text("[]"),
        "where names and values are expected",
    ),
    "facts 200,000 deep": (
        lambda r: (made.checkpoint_of(r) / "checkpoint.json").write_text("[" * 200_000),
        "no readable checkpoint.json",
    ),
    "a thousand million layers": (
        lambda r: made.change_facts(r, lambda f: f["network"].update(layers=10**9)),
        "layers=1000000000",
    ),
    "a network of 3 TB": (
        lambda r: made.change_facts(r, lambda f: f["network"].update(hidden=1 << 16, ffn=1 << 18, layers=40)),
        "says that its network has 4,",
    ),
    "a guard that is a text": (lambda r: made.change_facts(r, lambda f: f.update(guard="x")), "guard is 'x'"),
    "a step that is a text": (lambda r: made.change_facts(r, lambda f: f.update(step="x")), "step is 'x'"),
    "a choice that is a list": (
        lambda r: made.change_facts(r, lambda f: f["data"]["choice"].update(where=["a"])),
        "data.choice.where is a list",
    ),
    "a variable of the environment": (
        lambda r: made.change_facts(r, lambda f: f["store"].update(path="${oc.env:SECRET_TOKEN}")),
        "is never resolved",
    ),
    "another backend": (
        lambda r: made.replace_file(r, "metadata.json", b'{"sharded_backend": "../../evil"}'),
        "not that of a checkpoint of ours",
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What came of each checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = []
    for number, (name, (change, _)) in enumerate(CHECKPOINTS.items()):
        run = made.copy_run(folder / str(number))
        change(run)
        cases.append((name, "open_model", [made.checkpoint_of(run)]))
    return made.open_all(cases, folder)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_refused(name, checkpoints):
    checkpoints[name].assert_refused(CHECKPOINTS[name][1])


def test_a_store_that_is_none_is_refused_by_who_asks_for_it(tmp_path):
    parts = made.with_config(lambda c: c["provenance"].update(store=[1]))
    listed = made.with_config(lambda c: c.update(provenance=[1]))
    found = made.open_all(
        [
            ("store", "trained_on", [made.write_nemo(tmp_path / "store.nemo", parts)]),
            ("list", "trained_on", [made.write_nemo(tmp_path / "list.nemo", listed)]),
        ],
        tmp_path,
    )
    for opened in found.values():
        opened.assert_refused("what it says of its store")


def test_what_a_model_says_in_a_name_is_not_resolved_in_what_is_written(tmp_path, monkeypatch):
    """A file may be called as an interpolation; NeMo 1's configurations may hold some."""
    monkeypatch.setenv("SECRET_TOKEN", made.SECRET)
    directory = hugging_face(tmp_path).rename(tmp_path / "${oc.env:SECRET_TOKEN}")
    for kind, out in (("nemo", tmp_path / "out.nemo"), ("hf", tmp_path / "out")):
        code, printed, error = here("export", directory, "--to", kind, "--out", out)
        assert code == 0, error
        files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
        assert not any(made.SECRET.encode() in file.read_bytes() for file in files)
        assert made.SECRET not in printed


# -- a model's choice of cells


@pytest.fixture
def chooser(tmp_path):
    """Make a model whose run chose cells by a query; of the store that it was trained on, or of one that it says."""

    def make(where: str, store) -> Path:
        def change(cfg) -> None:
            cfg["provenance"]["data"]["choice"] = {"where": where, "exclude": None}
            cfg["provenance"].pop("store")
            if store is not None:
                cfg["provenance"]["store"] = store

        return made.write_nemo(tmp_path / "chooser.nemo", made.with_config(change))

    return make


OWN = yaml.safe_load(made.members()[made.CONFIG])["provenance"]["store"]
QUERY = "source == 'no such file'"


@pytest.mark.parametrize(
    ("store", "words"),
    [(None, "does not tell which store"), ({**OWN, "digest": "0" * 16}, "not the cells of the model's own run")],
    ids=["no store", "another store"],
)
def test_a_choice_is_not_applied_to_a_store_that_is_not_the_models_own(store, words, chooser):
    model = chooser(QUERY, store)
    code, out, _ = here("evaluate", model, made.STORE, "--cells", 8)
    assert code == 0
    assert words in out.splitlines()[0]
    assert "is not applied (--same-choice applies it)" in out.splitlines()[0]
    code, _, error = here("evaluate", model, made.STORE, "--cells", 8, "--same-choice")
    assert code == 1
    one_line(error, "no cell is left")


def test_a_choice_is_applied_to_the_models_own_store(chooser):
    code, _, error = here("evaluate", chooser(QUERY, OWN), made.STORE, "--cells", 8)
    assert code == 1
    one_line(error, "no cell is left")


def test_a_choice_runs_nothing(chooser, tmp_path):
    mark = tmp_path / "mark"
    where = f'source == "\\"" or @pd.io.common.os.system("touch {mark}") == 0 or source == "\\""'
    for store in (None, OWN):
        here("evaluate", chooser(where, store), made.STORE, "--cells", 8, "--same-choice")
        assert not mark.exists()


# -- the parts that the checks are made of


@pytest.mark.parametrize(
    "text",
    ["a: 1e-5", "a: 1.0e-12", "a: .5", "a: -1E+3", "a: .inf", "a: -.inf", "a: 1_000", "a: 2026-01-01", "a: 0x1f",
     "a: yes\nb: 'no'\nc: null\nd: ~\ne:", "a: [1, 2.5, x]\nb: {c: {d: e}}", "a: 12:30:00", "a: 1e5", "a: 1.", "a: e5",
     "a: 0o17", "a: 017", "a: |\n  x\n  y"],
)  # fmt: skip
def test_yaml_is_read_as_omegaconf_reads_it(text):
    assert repr(parse_yaml(text.encode())) == repr(OmegaConf.to_container(OmegaConf.create(text)))


@given(st.floats(allow_nan=False) | st.integers(-(2**60), 2**60) | st.text("abc{}[]:,'\"# \n€", max_size=20))
def test_what_omegaconf_writes_is_read_again(value):
    text = OmegaConf.to_yaml(OmegaConf.create({"a": {"b": [value]}}))
    assert parse_yaml(text.encode()) == {"a": {"b": [value]}}


@pytest.mark.parametrize(
    ("value", "shape", "words"),
    [
        ({"a": 1}, {"a": int}, None),
        ({}, {"a?": int}, None),
        ({"a": 1, "b": "x"}, {"a": int, "*": str}, None),
        ({"a": [[1, "x"]]}, {"a": [(int, str)]}, None),
        ({"a": None}, {"a": str | None}, None),
        ({}, {"a": int}, "a is missing"),
        ({"a": True}, {"a": int}, "a is True, where a whole number is expected"),
        ({"a": 1 << 64}, {"a": int}, "where a whole number"),
        ({"a": {"b": 1.5}}, {"a": {"*": int | None}}, "a.b is 1.5, where a whole number or nothing is expected"),
        ({"a": [1, "x"]}, {"a": [int]}, "a[1] is 'x'"),
        ({"a": [1]}, {"a": (int, str)}, "a is a list, where a list is expected"),
        ([], {"a": int}, "it is a list, where names and values are expected"),
    ],
)
def test_shapes_are_checked(value, shape, words):
    if words is None:
        check_shape(value, shape)
        return
    with pytest.raises(ValueError, match=r"expected|missing") as error:
        check_shape(value, shape)
    assert words in str(error.value)


def test_a_model_whose_configuration_would_be_resolved_is_not_written(tmp_path, monkeypatch):
    from megacell.geneformer.interchange.open import open_model
    from megacell.training.interchange import nemo

    monkeypatch.setenv("SECRET_TOKEN", made.SECRET)
    model = open_model(made.MODEL)
    model.cfg.provenance.step = "${oc.env:SECRET_TOKEN}"
    with pytest.raises(DataError, match="is never resolved") as error:
        nemo.save(model, tmp_path / "out.nemo")
    assert made.SECRET not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_restoring_takes_no_other_configuration(tmp_path):
    from megacell.geneformer import GeneformerModel

    for odd in ({"override_config_path": "x.yaml"}, {"save_restore_connector": object()}):
        with pytest.raises(UsageError, match="leave override_config_path"):
            GeneformerModel.restore_from(str(made.MODEL), **odd)
    assert GeneformerModel.restore_from(str(made.MODEL), return_config=True).provenance.step == 4
    assert (
        GeneformerModel.restore_from(str(made.MODEL)).vocabulary.hash == Vocabulary.open(made.RUN / "vocabulary").hash
    )

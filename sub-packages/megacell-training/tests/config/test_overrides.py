# SPDX-License-Identifier: Apache-2.0
"""Any path is taken as it stands; Hydra's own parser is the oracle."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megacell.training.config.overrides import key_of, parsed, quoted, value_of

PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text not in ("null", "???") and text[0] not in "'\"" and "$" not in text
)


@given(PATHS)
@example("data/donor=3,b/cells store")
@example("a'b\"c")
@example("a\\")
@example("a\\'b")
@example("{a: 1}")
@example("[x](y)")
@example("früh stück")
@example("1e3")
@example("true")
@example(" a ")
def test_any_path_reaches_hydra_as_it_stands(path):
    told = quoted(f"store={path}", ("store",))
    assert parsed([told]) == [("store", path)]
    assert value_of(told) == path
    assert quoted(told, ("store",)) == told, "once is enough: a launcher hands it on"


@pytest.mark.parametrize(
    "override", ["optim.lr=1e-3", "store=null", "store=???", "store='a b'", 'store="a"', "resume", "store="]
)
def test_what_is_no_text_or_has_quotes_stays(override):
    assert quoted(override, ("store",)) == override


def test_several_inputs_may_be_swept_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c,d"):
        (tmp_path / name).mkdir()
    assert quoted("store=a,b", ("store",), several=True) == "store=a,b"
    assert quoted("store=a,b", ("store",)) == "store='a,b'"
    assert quoted("store=c,d", ("store",), several=True) == "store='c,d'"
    assert quoted("store=a,z", ("store",), several=True) == "store='a,z'"


def test_the_name_of_an_option():
    assert key_of("+optim.lr=1") == "optim.lr"
    assert value_of("out='it\\'s'") == "it's"

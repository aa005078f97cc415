# SPDX-License-Identifier: Apache-2.0
"""Queries over cells' metadata: pandas is the oracle of what they mean, and nothing that they hold is run."""

import numpy as np
import pandas as pd
import pytest

from megacell.core.errors import UsageError
from megacell.store.read.query import LONGEST, matching

CELLS = 60
FRAME = pd.DataFrame(
    {
        "tissue": pd.Categorical(["lung", "liver", None] * 20),
        "age": np.arange(CELLS),
        "a b": np.arange(CELLS) % 2,
        "n": pd.array([1, None, 3] * 20, dtype="Int64"),
        "s": ["x.y", "abc", None] * 20,
        "flag": [True, False] * 30,
        "maybe": pd.array([True, None, False] * 20, dtype="boolean"),
    },
    index=[f"cell-{i}" for i in range(CELLS)],
)


def chosen(query: str) -> np.ndarray:
    """Return which of FRAME's cells a query names: bool [cells]."""
    return matching(query, list(FRAME.columns), lambda names: FRAME[[n for n in names if n != "index"]], "made.h5ad")


@pytest.mark.parametrize(
    "query",
    [
        "tissue == 'lung' and `a b` == 1", "tissue != tissue or age > 99", "10 < age <= 20", "age in [1, 2, 99]",
        "tissue not in ['lung']", "tissue == ['lung', 'liver']", "tissue != ('lung',)",
        "(age > 3) & (age < 7) | n == 3",
        "age > 3 & age < 7", "~(n == 1)", "not flag", "flag and age > 5", "maybe", "maybe == True", "n > 1", "n != 1",
        "age % 7 == 0 and age ** 2 > 100", "index == 'cell-3'", "s.str.contains('x.y')", "s.str.startswith('a')",
        "s.str.endswith('c')", "not s.notna()", "s.isna()", "tissue.notna() and -age < -50", "age.isin([3, 4])",
        "age / 2 - 1 < 3 + age // 9", "s == 'it\\'s' or s == \"a | b\" or age == 1", "`a b` == 0", "age == 1e1",
    ],
)  # fmt: skip
def test_a_query_means_what_it_means_in_pandas(query):
    expected = pd.Series(np.asarray(FRAME.eval(query, engine="python")), dtype="boolean").fillna(False)
    np.testing.assert_array_equal(chosen(query), expected.to_numpy(bool))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("tissu == 'lung'", "there is no column 'tissu'; columns are tissue, age"),
        ("age", "'age' is no condition on cells"),
        ("tissue", "is no condition on cells"),
        ("age + 1", "is no condition on cells"),
        ("age >", "it cannot be understood"),
        ("", "it cannot be understood"),
        ("age > 'x'", "Invalid comparison"),
        ("1 == 1", "names no column"),
        ("s == 'a' + s", "is no number"),
        ("'lung' in tissue", "a column is asked for in a list"),
        ("age < [1, 2]", "is compared with a list"),
        ("s.str.contains('a|b')", "takes no regular expression"),
        ("age.isin(3)", r"isin\(\) takes a list"),
        ("s.isna(1)", r"isna\(\) takes nothing"),
    ],
)
def test_a_query_that_is_none_says_what_is_wrong(query, said):
    with pytest.raises(UsageError, match=said):
        chosen(query)


HOSTILE = [  # what each tries is in its text; the numbers and sizes would take all time or memory
    's == "\\"" or @pd.io.common.os.system("touch {}") == 0 or s == "\\""', "s.to_csv('{}')", "s.to_pickle('{}')",
    "s.plot(backend='antigravity')", "`a'` == @pd or `b'`", "@pd", "__import__('os').system('touch {}')",
    "(lambda: open('{}', 'w'))()",
    "[open('{}', 'w') for x in s]", "s.__class__.__mro__", "s.str.__init__.__globals__",
    "age == s.apply(print)", "age.map(open)", "f'{s}'", "s.str.contains('(a+)+$')",
    "s.str.contains('x', regex=True)",
    "9**9**9**9**9 > age", "age > 10**10**10", "'a' * 10**12 == s", "s == '%999999999999d' % 1", "s * 10**9 == s",
    "(" * 4000 + "age" + ")" * 4000, "-" * 9000 + "age > 1", "not " * 2000 + "flag", "age > " + "9" * 5000,
    "age == 0" + " or age == 0" * LONGEST,
    "age == 1 if flag else flag", "age := 3", "await age", "{'a': age}", "age[0]",
    "age == ...", "age == 1j", "s == b'x'", "s == '\x00' and \x00", "import os", "age; flag", "a\nb",
    "*age", "age @ age",
    "age << 60", "age is None", "yield", "s.isin([s])", "s.isin([[1]])",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_of_a_hostile_query_is_run(query, tmp_path):
    mark = tmp_path / "mark"
    with pytest.raises(UsageError) as caught:
        chosen(query.replace("{}", str(mark)))
    assert not mark.exists()
    assert len(str(caught.value)) < 600

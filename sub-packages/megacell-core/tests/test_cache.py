# SPDX-License-Identifier: Apache-2.0
"""Arrays of the cache come back as they were, or not at all; a cache that cannot be written is no error."""

from pathlib import Path

import numpy as np
import pytest

from megacell.core import cache as module
from megacell.core.cache import cache_directory, keep, mapped

ARRAY = np.arange(50, dtype=np.uint16)


def test_an_array_is_mapped_as_it_was_kept(cache):
    path = cache / "lengths" / "a.npy"
    assert mapped(path, ARRAY.dtype, 50) is None
    assert keep(path, ARRAY) is ARRAY
    found = mapped(path, ARRAY.dtype, 50)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, ARRAY)
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY\x01\x00"], ids=["empty", "nonsense", "cut"])
def test_a_broken_file_is_as_none(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content)
    assert mapped(tmp_path / "a.npy", ARRAY.dtype, 50) is None


@pytest.mark.parametrize(("dtype", "size"), [(np.uint16, 49), (np.int16, 50)], ids=["another size", "another type"])
def test_another_array_is_as_none(dtype, size, tmp_path):
    keep(tmp_path / "a.npy", ARRAY)
    assert mapped(tmp_path / "a.npy", np.dtype(dtype), size) is None


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    warnings: list[str] = []  # not by way of caplog, which hears nothing where another test has set up logging
    monkeypatch.setattr(module.log, "warning", lambda text, *values: warnings.append(text % values))
    (tmp_path / "file").write_text("")
    assert keep(tmp_path / "file" / "a.npy", ARRAY) is ARRAY
    assert len(warnings) == 1
    assert "set MEGACELL_CACHE" in warnings[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MEGACELL_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/megacell"),
        ({"HOME": "/c"}, "/c/.cache/megacell"),
    ],
    ids=["its own variable", "XDG", "home"],
)
def test_the_cache_is_where_the_environment_says(environment, expected, monkeypatch):
    for name in ("MEGACELL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)

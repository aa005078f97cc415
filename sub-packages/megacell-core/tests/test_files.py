# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there, whatever happens while they are written."""

import pytest
import xxhash

from megacell.core.files import hash_file, hash_source, whole_file, write_whole


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a"
    with whole_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    write_whole(path, b"another")
    assert path.read_bytes() == b"another"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_there_is_the_old_file_and_no_other(error, tmp_path):
    write_whole(tmp_path / "a", b"old")

    def write_half():
        with whole_file(tmp_path / "a") as file:
            file.write(b"ha")
            raise error

    with pytest.raises(error):
        write_half()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_hash_is_xxh3_of_the_bytes_and_a_folders_that_of_its_files(tmp_path):
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder/b").write_bytes(b"b" * 9_000_000)  # more than is read at once
    (tmp_path / "folder/deep/a").write_bytes(b"")
    hashes = {name: xxhash.xxh3_64_hexdigest(content) for name, content in (("b", b"b" * 9_000_000), ("deep/a", b""))}
    assert hash_file(tmp_path / "folder/b") == hash_source(tmp_path / "folder/b") == hashes["b"]
    lines = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
    assert hash_source(tmp_path / "folder") == xxhash.xxh3_64_hexdigest(lines.encode())

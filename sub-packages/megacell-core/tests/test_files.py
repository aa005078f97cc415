# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there, whatever happens while they are written."""

import os

import pytest
import xxhash

from megacell.core.errors import DataError
from megacell.core.files import hash_file, hash_source, list_folder, remove_tree, whole_file, write_whole


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


@pytest.fixture
def victim(tmp_path):
    """A folder that nothing may be removed from, and a folder beside it with links to it."""
    victim, root = tmp_path / "victim", tmp_path / "root"
    for folder in (victim / "deep", root / "work/inner/more", root / "empty"):
        folder.mkdir(parents=True)
    (victim / "deep/a").write_text("precious")
    for name in ("work/link", "work/inner/link", "work/inner/more/link"):
        (root / name).symlink_to(victim)
        (root / f"{name}_of_file").symlink_to(victim / "deep/a")
        (root / f"{name}_to_nothing").symlink_to("nowhere")
    (root / "link").symlink_to(victim)
    return victim


@pytest.mark.parametrize("name", ["work", "link", "work/inner", "work/link", "empty", "nothing", "nothing/at/all"])
def test_a_folder_is_removed_with_the_links_in_it_and_nothing_of_what_they_lead_to(name, victim, tmp_path):
    root = tmp_path / "root"
    beside = {path for path in root.iterdir() if path.name != name}
    remove_tree(root, name)
    assert not (root / name).is_symlink()
    assert not (root / name).exists()
    assert {path for path in root.iterdir() if path.name != name} == beside
    assert (victim / "deep/a").read_text() == "precious"


@pytest.mark.parametrize("name", ["link/deep", "work/link/deep", "work/link/deep/a"])
def test_nothing_behind_a_link_is_removed_or_listed(name, victim, tmp_path):
    with pytest.raises(DataError, match=r"link: is a link; move it away"):
        remove_tree(tmp_path / "root", name)
    with pytest.raises(DataError, match=r"link: is a link; move it away"):
        list_folder(tmp_path / "root", name)
    with pytest.raises(DataError, match=r"work/link: is a link; move it away"):
        list_folder(tmp_path / "root", "work/link")
    assert (victim / "deep/a").read_text() == "precious"


@pytest.mark.parametrize("name", ["../victim", "work/../../victim", "/etc"])
def test_only_what_lies_below_the_folder_is_removed(name, victim, tmp_path):
    with pytest.raises(ValueError, match="is not below"):
        remove_tree(tmp_path / "root", name)
    assert (victim / "deep/a").exists()


def test_the_folder_itself_may_be_a_link(victim, tmp_path):
    remove_tree(tmp_path / "root/link", "deep")
    assert list_folder(tmp_path / "root/link") == list_folder(victim) == []


def test_a_folder_of_any_depth_is_removed(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    remove_tree(tmp_path, "d")
    assert list_folder(tmp_path) == []

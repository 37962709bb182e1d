"""Files and folders are whole or not there."""

from __future__ import annotations

import pytest

from moecore.files import atomic_folder, atomic_path


def test_a_folder_takes_the_place_of_another_when_all_is_done(tmp_path):
    place = tmp_path / "deep" / "bundle"
    for content in ("first", "second"):
        with atomic_folder(place) as folder:
            (folder / content).touch()
            assert not (place / content).exists()
        assert [one.name for one in place.iterdir()] == [content]
    assert [one.name for one in place.parent.iterdir()] == ["bundle"]


def test_a_folder_stays_as_it_was_when_the_block_fails(tmp_path):
    place = tmp_path / "bundle"
    with atomic_folder(place) as folder:
        (folder / "good").touch()
    with pytest.raises(TypeError), atomic_folder(place) as folder:
        (folder / "bad").write_text(b"bytes")
    assert [one.name for one in place.iterdir()] == ["good"]
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_takes_the_place_of_a_file(tmp_path):
    place = tmp_path / "bundle"
    place.touch()
    with atomic_folder(place) as folder:
        (folder / "one").touch()
    assert place.is_dir()
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_stays_as_it_was_when_the_block_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("good")
    with pytest.raises(TypeError), atomic_path(path) as temporary:
        temporary.write_text(b"bytes")
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]

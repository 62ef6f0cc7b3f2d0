"""Files that appear whole."""

import pytest

from regionspot.utils.files import atomic_path


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "茶" * 83 + ".json"])
def test_long_name_is_written(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("content")
        assert temporary.name.startswith(f".{name[0]}") and temporary.name.endswith(".tmp")
    assert [path.name for path in tmp_path.iterdir()] == [name]

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from regionspot.data.tokens.manifest import read_manifest
from regionspot.index import RegionIndex, search_index
from regionspot.index.store import INDEX


@pytest.fixture
def copy(index, tmp_path):
    shutil.copytree(index.directory, tmp_path / "index")
    return tmp_path / "index"


def replace_shard(directory, **tensors):
    """Write a shard with other tensors, as if the manifest knew it."""
    path = directory / "shard-00001.safetensors"
    content = load_file(path)
    save_file({**content, **tensors}, path)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = path.stat().st_size
    (directory / "manifest.json").write_text(json.dumps(manifest))


def search(directory):
    return search_index(RegionIndex(directory), torch.ones(1, 32))


@pytest.mark.parametrize("position", [10, 400, -1])
def test_changed_byte_is_found(copy, position):
    path = copy / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    [line] = RegionIndex(copy).find_damage()
    assert "shard-00001.safetensors is damaged: expected SHA-256" in line and "run regionspot index again" in line


def test_missing_and_truncated_shards(copy):
    path = copy / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"region index: shard .*00001.* is damaged: expected \d+ bytes"):
        search(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="region index: shard .* is missing"):
        search(copy)


@pytest.mark.parametrize("key", ["offsets", "name_ends", "embeddings", "boxes", "keys"])
def test_tensor_of_wrong_length_is_refused(copy, key):
    content = load_file(copy / "shard-00001.safetensors")
    replace_shard(copy, **{key: content[key][1:].contiguous()})
    with pytest.raises(ValueError, match=f"is damaged: {key} is not what the manifest says"):
        search(copy)


def test_offsets_outside_the_shard_are_refused(copy):
    content = load_file(copy / "shard-00001.safetensors")
    replace_shard(copy, offsets=torch.cat([content["offsets"][:-1], torch.tensor([10**6])]))
    with pytest.raises(ValueError, match="is damaged: offsets"):
        search(copy)


def test_damaged_shard_is_written_again(copy, index, predictor, index_cfg, image_set):
    from regionspot.index import build_index

    (copy / "shard-00001.safetensors").unlink()
    build_index(predictor, index_cfg, image_set, copy, shard_images=3, show_progress=False)
    name = "shard-00001.safetensors"
    assert (copy / name).read_bytes() == (index.directory / name).read_bytes() and not list(
        RegionIndex(copy).find_damage()
    )


def test_store_of_another_kind_is_refused(copy, tmp_path):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": "regionspot-tokens-2"}))
    with pytest.raises(ValueError, match=r"region index: .* is of format 'regionspot-tokens-2', expected 'regionsp"):
        RegionIndex(copy)
    with pytest.raises(FileNotFoundError, match="no manifest.json there; make it with regionspot index"):
        RegionIndex(tmp_path)
    del manifest["scoring"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="lacks keys of a manifest; run regionspot index again"):
        read_manifest(copy, INDEX)

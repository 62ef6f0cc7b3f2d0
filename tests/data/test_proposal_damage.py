"""Damaged proposal files end in a clear error or a correct run, and nothing else."""

import contextlib
import json
import mmap
import pickle
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from regionspot.data.coco_io import json_file
from regionspot.data.proposals import FORMATS, ProposalFile, write_proposals

from .test_proposals import random_proposals

NUMBER = 2500  # of damaged files of each format
SPARE = 256 << 20  # bytes that reading a file of a few hundred may take
SIZES = [(48, 64)] * 3
TOKENS = [b"null", b"true", b"{}", b"[]", b'"x"', b"-1", b"1e308", b"9" * 400, b"1e999", b"NaN", b"-Infinity", b"0.5"]
TOKENS += [b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"\0", b"]", b"}", b",", b'"', b'"\\ud800"', b"%d" % 2**63]


@contextlib.contextmanager
def limited_memory():
    """Let huge allocations fail, even of pages that are never touched."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def damage(data, rng):
    """Flip bits, overwrite, cut, insert, repeat or drop a stretch, once or several times."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, other = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        near = min(at + int(rng.integers(1, 12)), len(data))
        kind = rng.integers(9)
        if kind <= 1 and at < len(data):
            data[at] ^= 1 << rng.integers(8)
        elif kind == 2:
            data[at:near] = rng.bytes(near - at)
        elif kind == 3:
            data[at:near] = b"\xff\x7f"[rng.integers(2) :][:1] * (near - at)
        elif kind == 4:
            data = data[:at] if rng.integers(2) else data[at // 8 :]
        elif kind == 5:
            data[at:at] = rng.bytes(int(rng.integers(1, 20)))
        elif kind == 6:
            data[at:at] = TOKENS[rng.integers(len(TOKENS))]
        elif kind == 7:
            del data[at:other]
        else:
            data[at:at] = data[at:other]
        if not data:
            break
    return bytes(data)


def mutate(value, rng):
    """Change the structure of JSON at one place: delete, retype, rename, exaggerate, nest."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[rng.integers(len(keys))]
        kind = rng.integers(12)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[["x", "", "1e3", "99999999999999999999", "-0", "boxes"][rng.integers(6)]] = value.pop(key)
        elif kind == 2 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = mutate(value[key], rng)
        return value
    odd = [None, True, "1", "", -1, 0.5, 2**63, -(2**70), 10**400, 1e308, float("nan"), float("-inf"), [], {}, [[]]]
    odd += [[value], {"1": value}, [[[[1.0, 2, 3, 4]]]], {"boxes": []}, "\ud800", "a" * 1000]
    return odd[rng.integers(len(odd))]


def unlike(tensors, rng):
    """False entries in the header of safetensors: shapes, offsets, types."""
    size = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + size])
    entry = header[list(header)[rng.integers(len(header))]]
    if "shape" in entry:
        kind = rng.integers(4)
        entry["dtype"] = ["F64", "I8", "BOOL", "U64", "BF16", "X"][rng.integers(6)] if kind == 0 else entry["dtype"]
        numbers = entry["shape"] if kind == 1 else entry["data_offsets"]
        if kind:
            numbers[rng.integers(len(numbers))] = [0, 1, -1, 2**40, 2**62, 2**64, 7][rng.integers(7)]
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + tensors[8 + size :]


def use(path, ids):
    """Read a file and use all of it; return whether it could be read."""
    try:
        file = ProposalFile(path, with_masks=bool(ids[0] % 2))
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return False
    for image_id in (*ids, 77):
        proposals = file.get(image_id, SIZES[0])
        boxes = proposals.proposal_boxes.tensor.numpy()
        assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= [64, 48, 64, 48]).all()
        assert not proposals.has("scores") or ((proposals.scores >= 0) & (proposals.scores <= 1)).all()
    try:
        assert "boxes dropped" in file.summarize(ids, SIZES)
    except ValueError as error:
        assert "is it the right file?" in str(error)
    return True


@pytest.fixture
def fast_path():
    """A directory in memory where there is one: files that are written over and over are slow on some disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        yield Path(directory)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("error")
def test_damaged_proposal_files(fast_path, monkeypatch, format):
    monkeypatch.setattr(json_file, "CHUNK_BYTES", 300)  # so that there are several
    _, arrays = random_proposals(fast_path, images=3, num_boxes=4)
    original, path = fast_path / "original", fast_path / "damaged"
    write_proposals(original, format, arrays)
    data = original.read_bytes()
    files = [data]
    if format == "detectron2":  # all ways of writing it
        columns = {"boxes": np.split(arrays.boxes, 3), "scores": np.split(arrays.scores, 3)}
        files += [pickle.dumps({"ids": [1, 2, 3], **columns}, protocol) for protocol in (0, 2, 5)]
    rng = np.random.default_rng(FORMATS.index(format))
    read, slowest = 0, 0.0
    use(original, [1, 2, 3])
    with limited_memory():
        with pytest.raises(OSError, match="memory"):  # not by malloc, which may hold freed pages that are as large
            mmap.mmap(-1, 2 * SPARE)
        for index in range(NUMBER):
            if format in ("glip", "coco") and index % 2:
                damaged = json.dumps(mutate(json.loads(data), rng)).encode()
            elif format == "safetensors" and index % 3 == 0:
                damaged = unlike(data, rng)
            else:
                damaged = damage(files[rng.integers(len(files))], rng)
            path.write_bytes(damaged)
            start = time.perf_counter()
            read += use(path, [1, 2, 3])
            slowest = max(slowest, time.perf_counter() - start)
    assert 10 < read < NUMBER - 10  # else the damage was too small or too great to test
    assert slowest < 3

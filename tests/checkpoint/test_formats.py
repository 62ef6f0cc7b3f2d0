"""Files of weights: no file reaches a function or class, all bytes are checked, formats have one fingerprint."""

import functools
import pickle
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch

from regionspot.checkpoint.formats import (
    fingerprint,
    is_torchscript_archive,
    load_checkpoint_file,
    read_torchscript_state_dict,
)
from regionspot.utils.unpickling import array_of, load_arrays

from ..helpers import tiny_model

GLOBALS = [
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    "torch.jit._pickle build_intlist",
    "torch FloatStorage",
    "__torch__ Module",
]


def write_archive(path, program, members=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", program)
        for name, data in dict(members).items():
            archive.writestr(f"x/data/{name}", data)
    return path


def storage(key, numel, kind="FloatStorage"):
    text = b"X" + struct.pack("<I", len(key)) + key.encode()
    return b"(X\x07\0\0\0storagectorch\n%b\n%bX\x03\0\0\0cpuJ%btQ" % (kind.encode(), text, struct.pack("<i", numel))


def tensor(key, numel, size=None, stride=b"K\x01\x85", offset=b"K\0"):
    size = size or b"J" + struct.pack("<i", numel) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(%b%b%b%b\x89}tR" % (storage(key, numel), offset, size, stride)


def module(*pairs):
    state = b"".join(b"X" + struct.pack("<I", len(name)) + name.encode() + value for name, value in pairs)
    return b"c__torch__\nModule\n)\x81}(%bub" % state


def program(*pairs):
    return b"\x80\x02" + module(*pairs) + b"."


@pytest.mark.parametrize("named", GLOBALS)
@pytest.mark.parametrize("act", [b"}X\x04\0\0\0evilK\x01sb.", b"X\x04\0\0\0evilK\x01s.", b"(X\x04\0\0\0evilK\x01u."])
def test_file_cannot_change_a_global(tmp_path, named, act):
    module_name, _, name = named.partition(" ")
    path = write_archive(tmp_path / "evil.pt", b"\x80\x02c%b\n%b\n" % (module_name.encode(), name.encode()) + act)
    with pytest.raises(ValueError, match=r"evil.pt cannot be read as weights \((setting the state|expected dicts)"):
        load_checkpoint_file(path)
    torch.save({"a": torch.arange(4.0)}, tmp_path / "good.pth")
    assert load_checkpoint_file(tmp_path / "good.pth")["a"].tolist() == [0, 1, 2, 3]


def test_defaults_of_torch_functions_are_out_of_reach(tmp_path):
    """The file that made later tensors negative: it set ``__defaults__`` of what rebuilds them."""
    for state in (b"}(X\x0c\0\0\0__defaults__N\x88\x86ub.", b"N}(X\x0c\0\0\0__defaults__K\x01\x85u\x86b."):
        path = write_archive(tmp_path / "evil.pt", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state)
        with pytest.raises(ValueError, match="setting the state of tensor"):
            load_checkpoint_file(path)


def test_archive_with_modules_and_shared_storages(tmp_path):
    data = np.arange(6, dtype=np.float32).tobytes()
    transposed = tensor("0", 6, size=b"K\x03K\x02\x86", stride=b"K\x01K\x03\x86")
    path = write_archive(
        tmp_path / "x.pt", program(("a", tensor("0", 6)), ("m", module(("b", transposed)))), {"0": data}
    )
    state = load_checkpoint_file(path)
    assert state["a"].tolist() == [0, 1, 2, 3, 4, 5] and state["m.b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert state["a"].data_ptr() == state["m.b"].data_ptr()


def test_memory_bombs_are_refused(tmp_path):
    million = b"\0" * (1 << 20)
    names = [f"t{i}" for i in range(20000)]
    shared = program(*((name, tensor("0", 1 << 18)) for name in names))
    cases = {
        "stand for": (shared, zipfile.ZIP_STORED),  # 20 GB of one storage
        "compressed": (program(("a", tensor("0", 1 << 18))), zipfile.ZIP_DEFLATED),
    }
    for message, (content, compression) in cases.items():
        path = write_archive(tmp_path / "bomb.pt", content, {"0": million}, compression)
        with pytest.raises(ValueError, match=message):
            load_checkpoint_file(path)
    repeated = tensor("0", 1 << 18, size=b"J\0\0\0\x40\x85", stride=b"K\0\x85")  # one value, 2^30 times
    with pytest.raises(ValueError, match="stand for"):
        load_checkpoint_file(write_archive(tmp_path / "bomb.pt", program(("a", repeated)), {"0": million}))
    outside = tensor("0", 1 << 18, size=b"J\0\0\0\x40\x85")
    with pytest.raises(ValueError, match="bomb.pt cannot be read"):
        load_checkpoint_file(write_archive(tmp_path / "bomb.pt", program(("a", outside)), {"0": million}))
    itself = b"\x80\x02c__torch__\nModule\n)\x81q\0}(X\x01\0\0\0ah\0X\x01\0\0\0bh\0ub."
    with pytest.raises(ValueError, match="expected modules"):
        load_checkpoint_file(write_archive(tmp_path / "bomb.pt", itself))
    (tmp_path / "p.pkl").write_bytes(pickle.dumps([np.zeros(1 << 17)] * 100_000, 2))
    with pytest.raises(ValueError, match="stand for"):
        load_arrays(tmp_path / "p.pkl")
    (tmp_path / "p.pkl").write_bytes(pickle.dumps([np.zeros(1 << 17)] * 4, 2))
    assert len([array_of(item) for item in load_arrays(tmp_path / "p.pkl")]) == 4


def test_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 10000
    with pytest.raises(ValueError, match="bomb.pth cannot be read as weights .*is compressed"):
        load_checkpoint_file(tmp_path / "bomb.pth")


def test_flipped_bits_are_detected_or_harmless(tmp_path):
    """Headers, pickle, storages, padding and the central directory: an error, or the very same content."""
    content = {"model": {"a": torch.arange(300.0), "b": torch.ones(3, 5).half()}, "iteration": 11, "rate": 0.5}
    torch.save(content, tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    inside = [info.header_offset for info in zipfile.ZipFile(tmp_path / "good.pth").infolist()]
    generator = np.random.default_rng(0)
    places = [
        *generator.integers(0, len(good), 250),
        *(start + 4 for start in inside),
        *range(len(good) - 300, len(good)),
    ]
    refused = 0
    for place in map(int, places):
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "bad.pth").write_bytes(damaged)
        try:
            content_read = load_checkpoint_file(tmp_path / "bad.pth")
        except ValueError as error:
            assert "bad.pth" in str(error) and "weights_only" not in str(error)
            refused += 1
            continue
        assert content_read["iteration"] == 11 and content_read["rate"] == 0.5 and list(content_read) == list(content)
        assert all(torch.equal(content_read["model"][key], value) for key, value in content["model"].items())
    assert refused > 200
    data = good.index(torch.arange(300.0).numpy().tobytes())
    (tmp_path / "bad.pth").write_bytes(good[: data + 40] + bytes([good[data + 40] ^ 1]) + good[data + 41 :])
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_checkpoint_file(tmp_path / "bad.pth")


def test_old_pytorch_file_without_checksums(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_checkpoint_file(tmp_path / "old.pth")["a"].tolist() == [0, 1, 2, 3]


def test_error_omits_advice_to_trust_file(tmp_path):
    torch.save({"a": zlib.crc32}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="zlib.crc32") as caught:
        load_checkpoint_file(tmp_path / "evil.pth")
    assert "weights_only" not in str(caught.value) and "can still be loaded" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_torchscript_state_dict_without_running_code(tmp_path, monkeypatch):
    clip_model = tiny_model(names=None).recognizer.vision_language.clip_model
    tokens = torch.zeros(1, 77, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of branches, which do not matter here
        traced = torch.jit.trace(clip_model, (torch.zeros(1, 3, 32, 32), tokens), check_trace=False)
    torch.jit.save(traced, tmp_path / "clip.pt")
    torch.jit.save(
        torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))).half(),
        tmp_path / "half.pt",
    )
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("the archive was run"))
    for name in ("clip.pt", "half.pt"):
        assert is_torchscript_archive(tmp_path / name)
    state = load_checkpoint_file(tmp_path / "clip.pt")
    expected = clip_model.state_dict()
    assert set(state) == set(expected)
    half = read_torchscript_state_dict(tmp_path / "half.pt")
    assert half["0.weight"].dtype == torch.float16 and half["1.num_batches_tracked"].dtype == torch.int64


def test_torchscript_archive_with_a_call_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", pickle.dumps(functools.partial(print, "evil")))
    with pytest.raises(ValueError, match="functools.partial' is neither an array"):
        load_checkpoint_file(tmp_path / "x.pt")


def test_fingerprint_is_the_same_in_any_format():
    state = {"a": torch.arange(6.0), "b": torch.ones(())}
    same = {"b": torch.ones((), dtype=torch.float16), "a": torch.arange(6.0, dtype=torch.float64)}
    assert fingerprint(state) == fingerprint(same)
    others = [
        {**state, "a": torch.arange(6.0).view(2, 3)},
        {**state, "b": torch.zeros(())},
        {"a": state["a"], "c": state["b"]},
    ]
    assert len({fingerprint(s) for s in (state, *others)}) == 4

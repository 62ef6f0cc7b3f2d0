"""Detectron2's proposal pickles: those of any writer are read, and nothing in them is executed."""

import builtins
import functools
import itertools
import os
import pickle
import pickletools
import struct
import sys
from collections import OrderedDict

import numpy as np
import pytest
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import BoxMode

from regionspot.data.proposals import ProposalFile, write_proposals

BOXES = [np.array([[1, 2, 30.5, 40], [5, 5, 6, 7]], np.float32), np.zeros((0, 4), np.float32)]
SCORES = [np.array([0.5, 0.25], np.float32), np.zeros(0, np.float32)]
PLAIN = {"ids": [3, 1], "boxes": BOXES, "objectness_logits": SCORES, "bbox_mode": BoxMode.XYXY_ABS}


def read(tmp_path, content, protocol=4):
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol)
    (tmp_path / "p.pkl").write_bytes(data)
    return ProposalFile(tmp_path / "p.pkl")


def check(file):
    assert file.format == "detectron2" and file.image_ids.tolist() == [1, 3]
    assert file.boxes.tolist() == BOXES[0].tolist() and file.boxes.dtype == np.float32
    assert file.scores.tolist() == [0.5, 0.25]
    assert len(file.get(1, (9, 9))) == 0 and len(file.get(3, (50, 50))) == 2


def objects(items):
    array = np.empty(len(items), object)
    array[:] = items
    return array


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ids": ["3", "1"]},
        {"ids": np.array([3, 1])},
        {"ids": np.array(["3", "1"])},
        {"ids": [np.int64(3), np.int32(1)]},
        {"ids": (3, 1), "boxes": tuple(BOXES)},
        {"bbox_mode": 0},
        {"bbox_mode": BoxMode.XYWH_ABS, "boxes": [BOXES[0] - [[0, 0, 1, 2], [0, 0, 5, 5]], BOXES[1]]},
        {"boxes": objects(BOXES), "objectness_logits": objects(SCORES)},
        {"boxes": [np.asfortranarray(BOXES[0]), []], "objectness_logits": [[0.5, 0.25], []]},
        {"boxes": [BOXES[0].tolist(), np.zeros(0)], "objectness_logits": [SCORES[0][:, None], SCORES[1]]},
        {"boxes": [BOXES[0].astype(">f8"), BOXES[1].astype(np.float16)]},
    ],
    ids=range(12),
)
def test_pickles_of_any_writer(tmp_path, protocol, change):
    content = PLAIN | change
    check(read(tmp_path, content, protocol))
    check(read(tmp_path, OrderedDict(content), protocol))
    check(read(tmp_path, pickletools.optimize(pickle.dumps(content, protocol)), protocol))


def test_names_of_numpy_1_and_2_and_python_2(tmp_path):
    data = pickle.dumps(PLAIN, 2)
    for core in ("core", "_core"):
        check(read(tmp_path, data.replace(b"numpy.core.", f"numpy.{core}.".encode())))
    renamed = {"indexes": PLAIN["ids"], "scores": SCORES, "boxes": BOXES}  # Detectron's
    check(read(tmp_path, renamed, 2))
    mode = b"cdetectron2.structures.boxes\nBoxMode\n"
    head = pickle.dumps({"ids": [3, 1], "boxes": BOXES, "scores": SCORES}, 2)[:-1] + b"X\x09\0\0\0bbox_mode"
    check(read(tmp_path, head + mode + b"K\0\x85Rs."))
    check(read(tmp_path, head + b"cbuiltins\ngetattr\n" + mode + b"X\x08\0\0\0XYXY_ABS\x86Rs."))
    raw = BOXES[0].tobytes()  # an array as Python 2 writes it: its bytes are a str
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01K\x02K\x04\x86cnumpy\ndtype\n"
    )
    array += b"U\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U" + bytes([len(raw)])
    file = read(tmp_path, b"\x80\x02}(U\x03ids]K\x03aU\x05boxes]" + array + raw + b"tbau.")
    assert file.boxes.tolist() == BOXES[0].tolist() and file.scores is None


def test_detectron2_reads_written_proposals(tmp_path):
    content = PLAIN | {"objectness_logits": [np.array([-2.5, 3]), np.zeros(0)], "labels": [[7, 8], []]}
    file = read(tmp_path, content)
    assert file.arrays.scores_from == "logits" and file.labels.tolist() == [7, 8]
    for name in ("a.pkl", "b.pkl"):
        write_proposals(tmp_path / name, "detectron2", file.arrays)
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()
    records = load_proposals_into_dataset([{"image_id": 3}, {"image_id": 1}], str(tmp_path / "a.pkl"))
    assert records[0]["proposal_boxes"].tolist() == BOXES[0][::-1].tolist() and len(records[1]["proposal_boxes"]) == 0
    assert records[0]["proposal_bbox_mode"] == BoxMode.XYXY_ABS
    np.testing.assert_allclose(records[0]["proposal_objectness_logits"], [3, -2.5], rtol=1e-5)
    again = ProposalFile(tmp_path / "a.pkl")
    assert again.scores.tolist() == file.scores.tolist() and again.labels.tolist() == [7, 8]


def test_scores_are_logits_if_the_file_says_so(tmp_path):
    logits = read(tmp_path, PLAIN | {"scores_are": "logits"})
    np.testing.assert_allclose(logits.scores, 1 / (1 + np.exp([-0.5, -0.25])), rtol=1e-6)
    assert logits.arrays.scores_from == "logits"
    for other in ("probabilities", None, 5):
        probabilities = read(tmp_path, PLAIN | {"scores_are": other})
        assert probabilities.scores.tolist() == [0.5, 0.25] and probabilities.arrays.scores_from == "probabilities"


class Evil:
    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Plain:
    def __setstate__(self, state):
        TOUCHED.append(state)


TOUCHED = []
NESTS = [lambda x: x, lambda x: [x], lambda x: objects([x, 1]), lambda x: {"boxes": (x,)}]


def touch(*arguments):
    TOUCHED.append(arguments)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda bomb: Evil(os.system, f"touch {bomb}"), r"(posix|nt).system"),
        (lambda bomb: Evil(builtins.eval, f"open({str(bomb)!r}, 'w')"), "eval"),
        (lambda bomb: Evil(builtins.exec, f"open({str(bomb)!r}, 'w')"), "exec"),
        (lambda bomb: Evil(builtins.open, str(bomb), "w"), "open"),
        (lambda bomb: Evil(touch, 1), "test_proposal_pickles.touch"),
        (lambda bomb: Evil(getattr, np.ndarray, "tofile"), "getattr of ndarray"),
        (lambda bomb: Evil(getattr, BoxMode, "convert"), "getattr of BoxMode"),
        (lambda bomb: Evil(getattr, BoxMode, "__class__"), "getattr of BoxMode"),
        (lambda bomb: Evil(np.load, str(bomb)), "numpy.load"),
        (lambda bomb: Evil(np.fromfile, "/etc/hostname"), "numpy.*fromfile"),
        (lambda bomb: Evil(np.ndarray, (1 << 40,)), "a call of ndarray"),
        (lambda bomb: Evil(np.memmap, str(bomb), "u1", "w+", 0, (9,)), "memmap"),
        (lambda bomb: np.rec.array([(1, 2.0)]), "recarray|dtype|record"),
        (lambda bomb: np.zeros(2, [("x", "f4")]), "dtype"),
        (lambda bomb: np.ma.array([1.0]), "numpy.ma"),
        (lambda bomb: Plain(), "Plain|copy_?reg|opcode"),
        (lambda bomb: Evil(np.dtype, "f4", state=(3, Evil(touch, 2), None, None, None, -1, -1, 0)), "touch"),
        (lambda bomb: {1, 2}, "set|opcode"),
        (lambda bomb: slice(3), "slice"),
        (lambda bomb: functools.partial(touch, 1), "partial"),
        (lambda bomb: np.float32, "numpy.float32"),
        (lambda bomb: np.random.RandomState(0), "numpy.random"),
    ],
)
def test_malicious_pickles_are_refused(tmp_path, protocol, make, named):
    TOUCHED.clear()
    bomb = tmp_path / "bomb"
    for key, nest in itertools.product(("ids", "boxes", "more"), NESTS):
        with pytest.raises(ValueError, match=f"p.pkl: a pickle that is refused: .*({named})"):
            read(tmp_path, PLAIN | {key: nest(make(bomb))}, protocol)
    assert not bomb.exists() and not TOUCHED


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch BOMB'\ntR.",
        b"(S'touch BOMB'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch BOMB'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x04cos\nsystem\n)}\x92.",  # NEWOBJ_EX
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch BOMB\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x02os\x94\x8c\x06systemq\x00\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x14ndarray.__reduce_ex__\x93.",  # dotted names
        b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro()\x93.",
        b"\x80\x04\x8c\x14numpy.core.multiarray\x8c\x0b_reconstruct\x93cos\nsystem\nK\0\x85C\x01b\x87R.",
        b"\x80\x04]\x8c\x02os\x93.",  # a list for a module
        b"\x80\x02ccopyreg\n_reconstructor\n.",
        b"\x80\x02cnumpy\nndarray\n}b.",  # __setstate__ of what is no array in the making
        b"\x80\x02]}b.",
        b"\x80\x02}(X\x01\0\0\0aK\x01u}b.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85X\x01\0\0\0b\x87R}b.",
        b"\x80\x02\x82\x01.",  # EXT1, EXT2, EXT4
        b"\x80\x02\x83\x01\0.",
        b"\x80\x02\x84\x01\0\0\0.",
        b"\x80\x02X\x01\0\0\0xQ.",  # persistent ids
        b"Pevil\n.",
        b"\x80\x05\x97.",  # buffers out of band
        b"\x80\x02cnumpy\ndtype\n(X\x02\0\0\0O8K\0K\x01tR(K\x03X\x01\0\0\0|NNNJ\xff\xff\xff\xffcos\nsystem\nK?tb.",
        b"\x80\x02}]K\x01s.",  # keys that have no hash, or an endless one
        b"\x80\x02}" + b"K\x01\x85" + b"2\x86" * 60 + b"K\x01s.",
        b"\x80\x02\x8f.",
    ],
)
def test_opcodes_that_make_objects_are_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="p.pkl: (a pickle that is refused|expected a pickled dict|.* got a file that begins)"
    ):
        read(tmp_path, program)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.pkl"]


def laughs(depth=60):
    """A list of lists of lists ...: its text would never end."""
    items = [1.0]
    for _ in range(depth):
        items = [items, items]
    return items


def array_with_shape(shape):
    data = pickle.dumps(np.zeros((1, 4), np.float32), 2)
    packed = b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape) + b"t"
    place = data.index(b"K\x01K\x01K\x04\x86") + 2
    return data[:place] + packed + data[place + 5 :]


@pytest.mark.parametrize(
    "content",
    [
        {"ids": laughs(), "boxes": laughs()},
        laughs(),
        {"ids": [1], "boxes": [laughs()]},
        {"ids": [1], "boxes": BOXES[:1], "scores": [laughs()]},
        {"ids": [1], "boxes": BOXES[:1], "bbox_mode": laughs()},
        {"ids": [1 << 40000], "boxes": BOXES[:1]},
        {"ids": [1], "boxes": BOXES[:1], "labels": [[1 << 70, 1.5]]},
        array_with_shape((1 << 40, 4)),
        array_with_shape((1 << 62, 1 << 62, 4)),
        array_with_shape((-1, 4)),
        array_with_shape((4,) * 40),
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"abc.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"abc.",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"].",  # FRAME
        b"\x80\x02]r\xff\xff\xff\x7f.",  # LONG_BINPUT: the C unpickler would make a table of 16 GB
    ],
)
def test_memory_bombs_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="p.pkl: "):
        read(tmp_path, content)


def test_wrong_structures_are_refused(tmp_path):
    for change, message in [
        ({"boxes": None}, "boxes: expected a list with an item for each image, got nothing"),
        ({"boxes": BOXES[:1]}, "boxes: expected 2 items, as there are ids, got 1"),
        (
            {"boxes": [BOXES[0][:, :3], BOXES[1]]},
            r"boxes\[0\]: expected an array of shape \(n, 4\), got shape \(2, 3\)",
        ),
        ({"objectness_logits": [SCORES[0][:1], SCORES[1]]}, r"scores\[0\]: expected 2 numbers, got shape \(1,\)"),
        ({"labels": [[0.5, 1], []]}, r"labels\[0\]: expected 2 integers, got shape \(2,\) of float64"),
        ({"ids": ["a", "b"]}, r"ids\[0\]: expected an image id \(an integer\), got 'a'"),
        ({"ids": [1, 1]}, "image id 1 occurs twice"),
        ({"bbox_mode": BoxMode.XYXY_REL}, r"bbox_mode: expected XYXY_ABS \(0\) or XYWH_ABS \(1\), got 2"),
        ({"bbox_mode": True}, "bbox_mode: .* got True"),
    ]:
        with pytest.raises(ValueError, match=f"p.pkl: {message}"):
            read(tmp_path, PLAIN | change)
    with pytest.raises(ValueError, match="expected a pickled dict, got list"):
        read(tmp_path, [1])
    assert sys.getrecursionlimit() < 100_000
    with pytest.raises(ValueError, match="refused: damaged"):
        read(tmp_path, pickle.dumps(PLAIN)[:-20])

"""Which images inputs name, what they are called, and that a long list stays small."""

import json
import os
import struct
import time
import tracemalloc

import av
import numpy as np
import pytest
from PIL import Image

from regionspot.prediction.sources import ImageList, list_images
from regionspot.prediction.videos import FrameReader, count_frames

from ..helpers import write_dataset

PIXELS = Image.new("RGB", (8, 6))


def write_images(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIXELS.save(path, format="PNG")


def write_video(path, num_frames=40, codec="libx264", corner=0):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        for i in range(num_frames):
            pixels = np.full((48, 64, 3), i * 6, np.uint8)
            pixels[:12, :12] += np.uint8(corner)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def names(*inputs, **arguments):
    return [record.name for record in list_images([str(x) for x in inputs], **arguments)]


def test_directory_is_searched_in_order(tmp_path):
    write_images(tmp_path, "b.png", "a c.JPG", "sub/deep/ünï.webp", "sub/a.png", ".hidden.png", ".git/x.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert names(tmp_path) == ["a c.JPG", "b.png", "sub/a.png", "sub/deep/ünï.webp"]
    [record] = [record for record in list_images([str(tmp_path)]) if record.name == "sub/deep/ünï.webp"]
    assert record.path == str(tmp_path / "sub" / "deep" / "ünï.webp") and (record.index, record.image_id) == (3, 4)
    assert names(tmp_path, exclude=tmp_path / "sub") == ["a c.JPG", "b.png"]


def test_links_to_directories_do_not_loop(tmp_path):
    write_images(tmp_path, "photos/a.png", "other/b.png")
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "itself").symlink_to("itself")
    assert names(tmp_path / "photos") == ["a.png", "more/b.png"]


def test_unreadable_directory_is_skipped(tmp_path):
    write_images(tmp_path, "photos/a.png", "photos/z.png")
    deep = os.open(tmp_path / "photos", os.O_RDONLY)
    for _ in range(20):  # a path of more than 4,096 bytes cannot be read, not even by root
        os.mkdir("d" * 250, dir_fd=deep)
        deep, above = os.open("d" * 250, os.O_RDONLY, dir_fd=deep), deep
        os.close(above)
    os.close(deep)
    images = list_images([str(tmp_path / "photos")])
    assert [x.name for x in images] == ["a.png", "z.png"]
    [(path, reason)] = images.skipped
    assert len(path) > 4096 and reason.startswith(f"directory {path} cannot be read: File name too long")


def test_patterns_and_lists(tmp_path):
    write_images(tmp_path, "x/1.png", "x/y/2.png", "x/y/3.jpg", "z/4.png")
    assert names(tmp_path / "x" / "**" / "*.png") == ["1.png", "y/2.png"]
    assert names(tmp_path / "*" / "*.png") == ["x/1.png", "z/4.png"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/z/4.png\n\n{tmp_path}/x/y/2.png\n{tmp_path}/x/gone.png\n")
    assert names(f"@{tmp_path}/list.txt") == ["z/4.png", "x/y/2.png", "x/gone.png"]


def test_equal_names_and_stems_stay_apart(tmp_path):
    write_images(tmp_path, "one/cup.png", "two/cup.png", "two/cup.jpg", "two/cup.jpg.gif", "two/sub/cup.png")
    images = list_images([str(tmp_path / "one" / "cup.png"), str(tmp_path / "two"), str(tmp_path / "one" / "cup.png")])
    assert [x.name for x in images] == ["cup.png", "cup.jpg", "cup.jpg.gif", "cup~2.png", "sub/cup.png", "cup~3.png"]
    assert len({x.stem for x in images}) == len(images)
    assert [x.stem for x in images][:3] == ["cup.png", "cup.jpg", "cup.jpg.gif"]
    write_images(tmp_path, "three/results.png", "three/sub/results.png")
    assert [x.stem for x in list_images([str(tmp_path / "three")])] == ["results.png", "sub/results"]
    outside = list_images([str(tmp_path / "one" / ".." / "two" / "cup.png")])
    assert outside[0].name == "cup.png"


def test_many_equal_names_are_numbered_in_linear_time(tmp_path):
    images, start = ImageList(), time.process_time()
    for i in range(20_000):
        images.add(f"/photos/{i}", "cup.png")
    images.finish()
    assert time.process_time() - start < 10  # a second; minutes if all numbers were tried for each
    assert [images[i].name for i in (0, 1, 19_999)] == ["cup.png", "cup~2.png", "cup~20000.png"]


def test_dataset_keeps_its_ids(tmp_path):
    path = write_dataset(tmp_path / "data", num_scenes=3)
    content = json.loads(path.read_text())
    for image, image_id in zip(content["images"], (40, 7, 99)):
        image["id"] = image_id
    path.write_text(json.dumps({**content, "annotations": []}))
    images = list_images([f"{path}:{tmp_path}/data/images"])
    assert [(x.name, x.image_id, x.frame) for x in images] == [("0.png", 40, -1), ("1.png", 7, -1), ("2.png", 99, -1)]
    assert images.dataset == f"{path}:{tmp_path}/data/images"
    write_images(tmp_path, "a.png")
    with pytest.raises(ValueError, match="an input of its own"):
        list_images([f"{path}:{tmp_path}/data/images", str(tmp_path / "a.png")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no.png", "no such file"),
        ("*.png", "no image or video matches"),
        ("@no.txt", "no such file"),
        ("my.json", "names no images"),
        ("empty", "no images of JPEG"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        list_images([text])


def test_fingerprint_is_of_the_list(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    first = list_images([str(tmp_path)]).fingerprint()
    assert list_images([str(tmp_path)]).fingerprint() == first
    write_images(tmp_path, "c.png")
    assert list_images([str(tmp_path)]).fingerprint() != first


def test_long_list_stays_small(tmp_path):
    lines = [f"/photos/train/{i // 1000:05}/{i:012}.jpg" for i in range(20_000)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    tracemalloc.start()
    images = list_images([f"@{tmp_path}/list.txt"])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 20_000 and images[-1].path == lines[-1]
    assert size / 20_000 < 250  # bytes an image: 0.25 GB for a million


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".avi", "mpeg4")])
def test_frames_by_step_in_any_order(tmp_path, suffix, codec):
    path = tmp_path / f"clip{suffix}"
    write_video(path, codec=codec)
    assert count_frames(str(path)) == (40, "")
    images = list_images([str(path)], video_step=15)
    assert [(x.name, x.stem) for x in images] == [(f"clip{suffix}#{i:06}", f"clip{suffix}#{i:06}") for i in (0, 15, 30)]
    reader = FrameReader()
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for frame in (0, 1, 8, 23, 22, 39, 5, 39):
        assert np.array_equal(reader.read(str(path), frame), expected[frame])


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, -1, 0, 48, 0), -1), ((-1, 0, 0, -1, 64, 48), 2), ((0, -1, 1, 0, 0, 64), 1)],
    ids=["clockwise", "upside_down", "counterclockwise"],
)
def test_rotated_video_is_upright(tmp_path, matrix, turns):
    """The file's matrix (a, b, c, d, x, y) shows the stored pixel (p, q) at (ap + cq + x, bp + dq + y)."""
    write_video(tmp_path / "stored.mp4", num_frames=1, corner=200)
    content = (tmp_path / "stored.mp4").read_bytes()
    header, rotated = content.index(b"tkhd"), [value << 16 for value in matrix]
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    rotated = struct.pack(">9i", *rotated[:2], 0, *rotated[2:4], 0, *rotated[4:], 1 << 30)
    (tmp_path / "rotated.mp4").write_bytes(content[:header] + content[header:].replace(plain, rotated, 1))
    stored, frame = (FrameReader().read(str(tmp_path / name), 0) for name in ("stored.mp4", "rotated.mp4"))
    a, b, c, d, x, y = matrix
    corner = (b * 4 + d * 4 + y, a * 4 + c * 4 + x)  # row and column at which the bright corner is shown
    assert stored[4, 4].min() > 150 and frame[corner].min() > 150 and (frame.mean(axis=2) > 100).mean() < 0.1
    assert np.array_equal(frame, np.rot90(stored, turns))


def test_damaged_videos(tmp_path):
    write_video(tmp_path / "whole.avi", codec="mpeg4")
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / "no.mp4").write_bytes(b"not a video")
    images = list_images([str(tmp_path / "*.avi"), str(tmp_path / "no.mp4")])
    by_file = [x.name.split("#")[0] for x in images]
    assert by_file.count("whole.avi") == 40 and 5 < by_file.count("cut.avi") < 40
    assert [path.rsplit("/")[-1] for path, _ in images.skipped] == ["cut.avi", "no.mp4"]
    assert "is damaged after frame" in images.skipped[0][1] and "cannot be read" in images.skipped[1][1]
    last = [x for x in images if x.path.endswith("cut.avi")][-2]
    assert np.array_equal(
        FrameReader().read(last.path, last.frame), FrameReader().read(str(tmp_path / "whole.avi"), last.frame)
    )

"""Frames of videos, decoded by PyAV."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv"))


def import_av() -> Any:
    """Return PyAV.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV, which is not installed: pip install 'regionspot[video]'") from None
    av.logging.set_level(av.logging.PANIC)  # damaged videos are reported once, by us
    return av


def count_frames(path: str) -> tuple[int, str]:
    """Return the number of a video's frames, up to where the file is damaged, and the damage, "" for none.

    They are not decoded.

    Raises:
        OSError: not a video.
    """
    index = _Index(path)
    return len(index.times), index.damage


class _Index:
    """When a video's frames are shown, and which of them decoding can start with."""

    def __init__(self, path: str) -> None:
        av = import_av()
        times, keys, num_frames = [], [], 0
        self.damage = ""
        try:
            with av.open(path) as container:
                if not container.streams.video:
                    raise OSError(f"video {path}: no video in it")
                num_frames = container.streams.video[0].frames  # 0 where the file does not say
                for packet in self._packets(container, av.error.FFmpegError):
                    time = packet.pts if packet.pts is not None else packet.dts
                    times.append(time)
                    keys += [time] if packet.is_keyframe else []
        except av.error.FFmpegError as error:
            raise OSError(f"video {path} cannot be read: {error.strerror or error}") from error
        if not times:
            raise OSError(f"video {path} cannot be read: no frames in it")
        if num_frames > len(times):
            self.damage = f"{num_frames - len(times)} of {num_frames} frames are missing"
        self.can_seek = None not in times and len(set(times)) == len(times)
        self.times = sorted(times) if self.can_seek else times
        self.keys = sorted(keys) if self.can_seek else []

    def _packets(self, container: Any, error_type: type[Exception]) -> Iterator[Any]:
        packets = container.demux(container.streams.video[0])
        while True:
            try:
                packet = next(packets, None)
            except error_type as error:  # what comes before is of use
                self.damage = str(error)
                return
            if packet is None:
                return
            if packet.size:
                yield packet


class FrameReader:
    """Reads frames of videos in any order, and fast if it is nearly theirs: one decoder stays open."""

    def __init__(self) -> None:
        self._path = ""
        self._index: _Index | None = None
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._position = -1  # of the frame that was decoded last

    def read(self, path: str, frame: int) -> np.ndarray:
        """Return a frame, (H, W, 3) uint8 RGB, upright.

        Raises:
            OSError: the video cannot be read, or not this frame of it.
        """
        av = import_av()
        if path != self._path:
            self.close()
            self._index, self._path = _Index(path), path
        try:
            return self._read(av, frame)
        except (av.error.FFmpegError, StopIteration) as error:
            self._reset()
            reason = getattr(error, "strerror", None) or error or "it ends before"
            raise OSError(f"video {path}: frame {frame} cannot be decoded: {reason}") from error

    def close(self) -> None:
        """Close the video."""
        self._reset()
        self._path, self._index = "", None

    def _reset(self) -> None:
        if self._container is not None:
            self._container.close()
        # the frames hold the decoder, and with it its threads
        self._container, self._frames, self._position = None, iter(()), -1

    def _read(self, av: Any, frame: int) -> np.ndarray:
        index = self._index
        assert index is not None
        if self._container is None or frame <= self._position or self._is_behind_key(frame):
            self._reset()
            self._container = av.open(self._path)
            stream = self._container.streams.video[0]
            if index.can_seek and frame:
                self._container.seek(index.times[frame], stream=stream)
            self._frames = self._container.decode(stream)
        while True:
            decoded = next(self._frames)
            if index.can_seek and decoded.pts is not None:
                self._position = bisect_right(index.times, decoded.pts) - 1
            else:
                self._position += 1
            if self._position >= frame:
                break
        if self._position > frame:
            raise OSError(f"video {self._path}: frame {frame} cannot be decoded: it is damaged")
        # a phone's upright video is stored on its side; the file says by how many degrees it is turned back
        return np.ascontiguousarray(np.rot90(decoded.to_ndarray(format="rgb24"), round(decoded.rotation / 90)))

    def _is_behind_key(self, frame: int) -> bool:
        """Return whether there is a key frame between the last frame and this one, where decoding can start instead."""
        index = self._index
        if index is None or not index.can_seek or self._position < 0:
            return False
        key = bisect_right(index.keys, index.times[frame]) - 1
        return key >= 0 and index.keys[key] > index.times[self._position] and frame > self._position + 1

"""One run at a time per directory."""

import multiprocessing

import pytest

from regionspot.utils.run_lock import run_lock


def _hold(directory, started):
    with run_lock(directory):
        started.set()
        multiprocessing.Event().wait()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a directory."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", started))
    process.start()
    assert started.wait(30)
    yield process
    process.kill()
    process.join()


def test_second_run_is_refused(holder, tmp_path):
    with pytest.raises(ValueError, match=f"out: another run is at work there .process {holder.pid} on .*OUTPUT_DIR"):
        _take(tmp_path / "out")
    with run_lock(tmp_path / "other"):
        pass


def test_lock_ends_with_killed_process(holder, tmp_path):
    holder.kill()
    holder.join()
    with run_lock(tmp_path / "out"):
        pass


def test_lock_is_reentrant(tmp_path):
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    context = multiprocessing.get_context("fork")
    with run_lock(tmp_path):
        with run_lock(f"{tmp_path}/."):
            pass
        process = context.Process(target=_must_be_refused, args=(tmp_path,))  # the inner one has not let go
        process.start()
        process.join()
        assert process.exitcode == 0


def _must_be_refused(directory):
    with pytest.raises(ValueError, match="another run"):
        _take(directory)


def test_lock_is_released_after_error(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    process = multiprocessing.get_context("fork").Process(target=_take, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _take(directory):
    with run_lock(directory):
        pass

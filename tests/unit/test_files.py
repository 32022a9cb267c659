"""Laws of the SSD files: one place per block, bounded and private; bad directories are named."""

import errno
import fcntl
import os
import stat

import numpy as np
import pytest

from flexkv.common.errors import ClosedError, ConfigError, StorageError
from flexkv.io.ssd import files as files_module
from flexkv.io.ssd.files import FileOptions, StripedFiles
from flexkv.io.ssd.locks import NOTE_NAME

STRIDE = 4096


@pytest.fixture
def folders(tmp_path):
    """Return three directories, which do not exist yet."""
    return [tmp_path / name for name in "abc"]


def data_files(folder):
    """Return the names of the block files in a directory."""
    return sorted(path.name for path in folder.glob("*.flexkv") if path.name != NOTE_NAME)


@pytest.mark.parametrize("directories", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [1, 2, 7, 30])
@pytest.mark.parametrize("max_file_size_bytes", [None, STRIDE - 1, 4 * STRIDE])
def test_every_block_has_a_place_of_its_own(folders, directories, num_blocks, max_file_size_bytes):
    """Blocks fill the files without gaps, each in its directory, and no file exceeds its bound."""
    folders = folders[:directories]
    files = StripedFiles.open(folders, num_blocks, STRIDE, max_file_size_bytes)
    file_index, offset = files.locate(np.arange(num_blocks))
    ends = {}
    for block, (index, start) in enumerate(zip(file_index.tolist(), offset.tolist(), strict=True)):
        assert os.path.dirname(files.paths[index]) == str(folders[block % directories])
        ends.setdefault(index, []).append(start)
    assert sorted(ends) == list(range(len(files.fds)))
    for index, starts in ends.items():
        assert starts == [STRIDE * place for place in range(len(starts))]
        assert os.fstat(files.fds[index]).st_size == STRIDE * len(starts)
        if max_file_size_bytes is not None:
            assert len(starts) <= max(1, max_file_size_bytes // STRIDE)
    files.close()


def test_positions_count_up_within_a_file_only(folders):
    """Positions are consecutive exactly for neighbours in one file."""
    files = StripedFiles.open(folders[:2], 16, STRIDE, 3 * STRIDE)
    ids = np.arange(16)
    file_index, offset = files.locate(ids)
    positions = files.positions(ids)
    for a in range(16):
        for b in range(16):
            neighbours = file_index[a] == file_index[b] and offset[b] == offset[a] + STRIDE
            assert (positions[b] == positions[a] + 1) == neighbours
    files.close()


def test_space_is_allocated_and_private(folders):
    """Files have their space from the start, and only their owner can read them."""
    files = StripedFiles.open(folders[:1], 64, STRIDE)
    status = os.fstat(files.fds[0])
    assert status.st_blocks * 512 >= 64 * STRIDE
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700
    files.close()


def test_an_earlier_run_is_reused(folders):
    """Open keeps the bytes of an earlier run, and makes the file private and of the right size."""
    files = StripedFiles.open(folders[:1], 8, STRIDE)
    path = files.paths[0]
    files.close()
    with open(path, "r+b") as file:
        file.write(b"from an earlier run")
        file.truncate(12 * STRIDE)
    os.chmod(path, 0o644)
    files = StripedFiles.open(folders[:1], 8, STRIDE)
    assert os.fstat(files.fds[0]).st_size == 8 * STRIDE
    assert stat.S_IMODE(os.fstat(files.fds[0]).st_mode) == 0o600
    files.close()
    with open(path, "rb") as file:
        assert file.read(19) == b"from an earlier run"


def test_files_beyond_the_bound_are_removed(folders):
    """A smaller tier removes the extra files of a larger one, and nothing else."""
    StripedFiles.open(folders[:1], 8, STRIDE, 2 * STRIDE).close()
    (folders[0] / "other.txt").write_text("not ours")
    StripedFiles.open(folders[:1], 4, STRIDE, 2 * STRIDE).close()
    assert data_files(folders[0]) == ["blocks-0000.flexkv", "blocks-0001.flexkv"]
    assert (folders[0] / "other.txt").exists()


def test_unaligned_blocks_are_buffered(folders):
    """Blocks that O_DIRECT cannot move use the page cache, and `why` has the reason."""
    files = StripedFiles.open(folders[:1], 4, 1000)
    assert not files.direct
    assert "not aligned" in files.why
    files.close()


def refuse_direct(monkeypatch, errno_of_refusal=errno.EINVAL):
    """Make the file systems of this process refuse O_DIRECT."""
    real = fcntl.fcntl

    def refusing(fd, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno_of_refusal, os.strerror(errno_of_refusal))
        return real(fd, command, argument)

    monkeypatch.setattr(files_module.fcntl, "fcntl", refusing)


def test_a_filesystem_without_o_direct_is_buffered(monkeypatch, folders):
    """If a file system refuses O_DIRECT, all files are buffered, and the reason names the file."""
    refuse_direct(monkeypatch)
    files = StripedFiles.open(folders[:2], 4, STRIDE)
    assert not files.direct
    assert f"O_DIRECT refused for {files.paths[0]} (Invalid argument)" in files.why
    assert not any(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT for fd in files.fds)
    files.close()


def test_direct_means_that_every_file_is(folders):
    """`direct` is true exactly when all descriptors have O_DIRECT."""
    files = StripedFiles.open(folders, 9, STRIDE)
    flags = {bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) for fd in files.fds}
    assert flags == {files.direct}
    assert bool(files.why) != files.direct
    files.close()


def refused(folders, num_blocks=4):
    """Return the ConfigError that opening raises, and check that no descriptor is left."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError) as caught:
        StripedFiles.open(folders, num_blocks, STRIDE)
    assert os.listdir("/proc/self/fd") == before
    return caught.value


def test_a_missing_parent_is_named(tmp_path):
    """Only the last component of a directory is created; a missing parent is named."""
    error = refused([tmp_path / "missing" / "cache"])
    assert error.field == "ssd_cache_dir"
    assert f"{tmp_path / 'missing'} does not exist" in error.why


def test_a_file_is_no_directory(tmp_path):
    """A path that is a file is refused as not being a directory."""
    (tmp_path / "cache").write_text("")
    assert refused([tmp_path / "cache"]).why == "is not a directory"


def test_a_parent_that_is_a_file_is_named(tmp_path):
    """For a path below a file, the error names that file."""
    (tmp_path / "file").write_text("")
    assert refused([tmp_path / "file" / "cache"]).why == f"{tmp_path / 'file'} is not a directory"


def test_a_directory_that_takes_no_files_is_named():
    """A directory in which not even root can create files is named, with the reason."""
    error = refused(["/sys/kernel"])
    assert error.value == "/sys/kernel/lock.flexkv"
    assert "cannot be used" in error.why


def test_a_leftover_that_cannot_be_removed_is_named(folders):
    """A directory with the name of a block file is an error, and stays."""
    (folders[0] / "blocks-0009.flexkv").mkdir(parents=True)
    assert "cannot be removed" in refused(folders[:1]).why


def test_no_directory_is_an_error():
    """An SSD tier without a directory is an error."""
    assert refused([]).field == "ssd_cache_dir"


def test_a_directory_in_use_names_its_holder(folders):
    """A second engine in a directory is refused with the pid of the first."""
    files = StripedFiles.open(folders[:1], 4, STRIDE)
    assert refused(folders[:1]).why == f"is in use by process {os.getpid()}"
    files.close()
    StripedFiles.open(folders[:1], 4, STRIDE).close()


def test_a_directory_named_twice_is_refused(folders):
    """A directory that is given twice is refused, as its files would overlap."""
    assert "is in use" in refused([folders[0], folders[0]]).why


def test_more_than_the_disk_has_is_refused_before_it_is_filled(folders):
    """A tier larger than the free space is refused at once, with field, value and wanted bytes."""
    error = refused(folders[:2], num_blocks=1 << 40)
    assert (error.field, error.value) == ("num_ssd_blocks", 1 << 40)
    assert "needs 4,194,304.00 GB more" in error.why
    assert "set num_ssd_blocks lower" in error.why


@pytest.mark.parametrize(
    ("number", "field"),
    [
        (errno.ENOSPC, "num_ssd_blocks"),
        (errno.EDQUOT, "num_ssd_blocks"),
        (errno.EFBIG, "num_ssd_blocks"),
        (errno.EIO, "ssd_cache_dir"),
    ],
)
def test_a_refused_allocation_is_a_configuration_error(monkeypatch, folders, number, field):
    """An allocation that fails in spite of the check is a ConfigError that names the key."""

    def refuse(fd, offset, length):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert refused(folders[:1]).field == field


def test_an_allocation_that_fails_half_way_gives_back_what_it_took(monkeypatch, folders):
    """After an allocation that fails half-way, the files of an earlier run have their old size."""
    StripedFiles.open(folders, 6, STRIDE).close()
    before = [(path, path.stat().st_blocks) for folder in folders for path in folder.glob("bl*")]
    allocate = os.posix_fallocate
    refusals = iter([None, None, errno.ENOSPC])

    def refuse_the_third(fd, offset, length):
        allocate(fd, offset, length)
        if (number := next(refusals)) is not None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse_the_third)
    assert refused(folders, num_blocks=600).field == "num_ssd_blocks"
    assert [(path, path.stat().st_blocks) for path, _ in before] == before
    assert len(before) == 3


@pytest.mark.parametrize("error", [ClosedError("closed"), KeyboardInterrupt()])
def test_an_open_that_is_cut_short_gives_back_what_it_took(folders, error):
    """An open that is cancelled or interrupted leaves the files as large as they were."""
    StripedFiles.open(folders, 6, STRIDE).close()
    before = [(path, path.stat().st_blocks) for folder in folders for path in folder.glob("bl*")]

    def pause():
        if sum(path.stat().st_blocks for path, _ in before) > 3 * sum(size for _, size in before):
            raise error

    with pytest.raises(type(error)):
        StripedFiles.open(folders, 600, STRIDE, options=FileOptions(pause=pause))
    assert [(path, path.stat().st_blocks) for path, _ in before] == before
    assert len(before) == 3


def test_sync_reports_the_file_that_failed(monkeypatch, folders):
    """A failed sync is a StorageError with the errno and the path."""
    files = StripedFiles.open(folders[:1], 4, STRIDE)
    files.sync()

    def refuse(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files_module.os, "fdatasync", refuse)
    with pytest.raises(StorageError) as caught:
        files.sync()
    assert (caught.value.path, caught.value.errno) == (files.paths[0], errno.EIO)
    files.close()


def test_close_gives_descriptors_back(folders):
    """After close no descriptor is open, and closing again does nothing."""
    before = os.listdir("/proc/self/fd")
    files = StripedFiles.open(folders, 9, STRIDE)
    files.close()
    files.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_fork_after_a_refused_open_leaves_the_numbers_alone(monkeypatch, folders):
    """A forked child does not close descriptors whose numbers a failed open had used before."""
    seen = []
    open_all = StripedFiles._open_all

    def refuse(files, options, failing):
        open_all(files, options, failing)
        seen.append(files)  # the handler of the error may keep its frames alive
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(StripedFiles, "_open_all", refuse)
    with pytest.raises(OSError, match="error"):
        StripedFiles.open(folders[:1], 4, STRIDE)
    (files,) = seen
    numbers = {*files.fds, *(folder.fd for folder in files.folders)}
    theirs = [os.open(folders[0], os.O_RDONLY) for _ in numbers]
    assert numbers & set(theirs)
    child = os.fork()
    if not child:  # pragma: no cover -- measured in the parent only
        os._exit(sum(not os.path.samestat(os.fstat(fd), folders[0].stat()) for fd in theirs))
    assert os.waitpid(child, 0)[1] == 0
    for fd in theirs:
        os.close(fd)

"""Image files from bands of rows: read back by other programs' readers, in bounded memory, all or nothing."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tiledcore.io import images, writers
from tiledcore.io.writers import TILE, write_rows

METADATA: dict[str, Any] = {"prompt": "a coast, côte, 海岸", "seed": 2**63, "size": [3, 2]}


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cut(image: NDArray[np.uint8], rows: int) -> Iterator[NDArray[np.uint8]]:
    return (image[top : top + rows] for top in range(0, len(image), rows))


def means(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The next level of a pyramid, pixel by pixel of the definition."""
    height, width, _ = image.shape
    out = np.empty((-(-height // 2), -(-width // 2), 3), np.uint8)
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            rows, columns = [2 * y, min(2 * y + 1, height - 1)], [2 * x, min(2 * x + 1, width - 1)]
            out[y, x] = np.floor(image[np.ix_(rows, columns)].mean(axis=(0, 1), dtype=np.float64) + 0.5)
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 301))
def test_png_is_what_pillow_reads(tmp_path_factory: pytest.TempPathFactory, height: int, width: int, rows: int) -> None:
    path = tmp_path_factory.mktemp("png") / "a.png"
    image = picture(height, width)
    write_rows(path, (width, height), cut(image, rows), METADATA)
    with Image.open(path) as read:
        read.verify()  # all checksums
    with Image.open(path) as read:
        assert (read.mode, read.size) == ("RGB", (width, height))
        assert np.array_equal(np.asarray(read), image)
        assert read.info["Description"] == METADATA["prompt"]
    assert images.read_metadata(path) == METADATA
    assert os.listdir(path.parent) == ["a.png"]


@pytest.mark.parametrize("size", [(1, 1), (256, 256), (257, 256), (600, 513), (511, 1030)])
def test_tiff_is_a_pyramid_that_libtiff_reads(tmp_path: Path, size: tuple[int, int]) -> None:
    path, level = tmp_path / "a.tif", picture(size[1], size[0])
    write_rows(path, size, cut(level, 100), METADATA)
    with Image.open(path) as read:  # Pillow's TIFF reader is libtiff
        for page in range(read.n_frames):
            read.seek(page)
            assert np.array_equal(np.asarray(read), level)
            assert read.tag_v2[254] == min(page, 1)  # a reduced version of another page
            last, level = max(level.shape), means(level)
        assert last <= TILE
        assert read.n_frames == 1 or 2 * last > TILE
    assert images.read_metadata(path) == METADATA
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff and all(page.is_tiled for page in tiff.pages)
    assert os.listdir(tmp_path) == ["a.tif"]


def test_libvips_reads_the_pyramid(tmp_path: Path) -> None:
    vips = pytest.importorskip("pyvips", exc_type=ImportError)
    image = picture(700, 900)
    write_rows(tmp_path / "a.tif", (900, 700), cut(image, 64), METADATA)
    for page, expected in enumerate([image, means(image)]):
        level = vips.Image.new_from_file(str(tmp_path / "a.tif"), page=page)
        assert np.array_equal(level.numpy(), expected)


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_formats_that_are_written_whole(tmp_path: Path, extension: str) -> None:
    image = np.full((80, 64, 3), (200, 30, 90), np.uint8)
    write_rows(tmp_path / f"a.{extension}", (64, 80), cut(image, 32), METADATA)
    Image.fromarray(image).save(tmp_path / f"b.{extension}", quality=95)
    assert (tmp_path / f"a.{extension}").read_bytes() == (tmp_path / f"b.{extension}").read_bytes()


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ([(3, 4), (2, 4)], "5 rows, but the image has 6"),
        ([(3, 4), (4, 4)], r"up to row 7 of an RGB image of \(4, 6\)"),
        ([(6, 5)], r"uint8 \[6, 5, 3\]"),
    ],
)
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_bands_that_are_not_the_image(
    tmp_path: Path, bands: list[tuple[int, int]], message: str, extension: str
) -> None:
    path = tmp_path / f"a.{extension}"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_rows(path, (4, 6), iter([picture(*shape) for shape in bands]), METADATA)
    assert (os.listdir(tmp_path), path.read_text()) == ([path.name], "old")


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_decoder_that_fails_leaves_the_old_file(tmp_path: Path, extension: str) -> None:
    def failing() -> Iterator[NDArray[np.uint8]]:
        yield picture(300, 400)
        raise KeyboardInterrupt

    path = tmp_path / f"a.{extension}"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_rows(path, (400, 600), failing(), METADATA)
    assert (os.listdir(tmp_path), path.read_text()) == ([path.name], "old")


@pytest.mark.parametrize("limit", [20_000, 500_000, 1_300_000])
@pytest.mark.parametrize("extension", ["png", "tif"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, extension: str, limit: int) -> None:
    """The kernel refuses to let a file grow over the limit. 1.3 MB: the last level's, or the last chunk."""
    path = tmp_path / f"a.{extension}"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_rows(path, (700, 700), cut(picture(700, 700), 64), METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert (os.listdir(tmp_path), path.read_text()) == ([path.name], "old")


def test_a_full_disk_under_a_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(self)

    closed: list[Any] = []

    def full(**kwargs: Any) -> IO[bytes]:
        return Full()  # type: ignore[return-value]

    monkeypatch.setattr(writers, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        write_rows(tmp_path / "a.tif", (300, 300), cut(picture(300, 300), 64), METADATA)
    assert os.listdir(tmp_path) == [] and len(closed) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tiledcore.io.writers import write_rows

def bands():
    yield np.zeros((300, 400, 3), np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)

write_rows(Path(sys.argv[1]), (400, 600), bands(), {"prompt": ""})
"""


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path: Path, extension: str) -> None:
    """Only of the same target, and only of processes that are gone."""
    path, other = tmp_path / f"a.{extension}", tmp_path / f"b.{extension}"
    left: list[str] = []
    for target in (path, other):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(target)], capture_output=True, text=True)
        assert killed.returncode == -9, killed.stderr
        left += set(os.listdir(tmp_path)) - set(left)
    mine, _ = left
    start, dead = mine.removesuffix(".tmp").rsplit("-", 1)
    theirs = {f"{start}-{os.getppid()}.tmp", f"{start}-{dead}.txt", f"{start}-{dead}.tmp~", f".tiledcore-{dead}.tmp"}
    for name in theirs:
        (tmp_path / name).touch()
    write_rows(path, (400, 300), iter([picture(300, 400)]), METADATA)
    assert set(os.listdir(tmp_path)) == {path.name, *theirs, *left} - {mine}


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from tiledcore.io.writers import write_rows
import tifffile

def bands(height, width):
    for top in range(0, height, 64):
        band = np.full((64, width, 3), top % 251, np.uint8)
        band[:, ::7] += 3
        yield band

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

width, height = int(sys.argv[2]), int(sys.argv[3])
before = peak()
write_rows(Path(sys.argv[1]), (width, height), bands(height, width), {"prompt": ""})
print(peak() - before)
"""


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_memory_does_not_grow_with_the_height(tmp_path: Path, extension: str) -> None:
    """3 x 4096 bytes a row: 12.6 MB for 1024 rows, 201 MB for 16384, of which a tenth may be held at once."""
    grown = []
    for height in (1024, 16384):
        arguments = [sys.executable, "-c", MEASURE, str(tmp_path / f"a.{extension}"), "4096", str(height)]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True)
        grown.append(int(result.stdout))
    assert grown[1] < grown[0] + 20e6
    assert grown[1] < 80e6

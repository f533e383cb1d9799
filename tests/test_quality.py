"""Planted seams must be found in order of strength; images without seams must pass."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bench import seams
from bench.quality import likeness, seam_check, seam_profile

SIZE = 512
LINES = (64, 160, 256, 352, 448)


def field(seed: int, size: int = SIZE) -> NDArray[np.float64]:
    """A smooth periodic Gaussian random field, three channels, unit variance."""
    rng = np.random.default_rng(seed)
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    spectrum = (k**2 + (1 / 48) ** 2) ** -0.75
    noise = np.fft.rfft2(rng.standard_normal((3, size, size)))
    result = np.fft.irfft2(noise * spectrum, (size, size))
    return np.moveaxis(result / result.std(), 0, -1)


def brute_ratio(image: NDArray[np.float64], line: int) -> float:
    """The definition, line by line: the 16 nearest, ties taken from both sides."""
    size = len(image)
    d = {y: float(np.abs(image[y] - image[y - 1]).mean()) for y in range(1, size)}
    nearest = sorted((y for y in d if y != line), key=lambda y: abs(y - line))[:16]
    return d[line] / float(np.mean([d[y] for y in nearest]))


@pytest.mark.parametrize("line", [1, 2, 8, 9, 20, 31, 32, 39])
def test_profile_matches_the_definition(line: int) -> None:
    image = np.random.default_rng(0).standard_normal((40, 24, 3))
    along_y, along_x = seam_profile(image)
    assert len(along_y) == 40 and len(along_x) == 24 and np.isnan(along_y[0])
    assert along_y[line] == pytest.approx(brute_ratio(image, line))
    if line < 24:
        assert along_x[line] == pytest.approx(brute_ratio(np.swapaxes(image, 0, 1), line))


def test_wrapped_profile_does_not_depend_on_where_the_image_is_cut() -> None:
    image = field(0, 64)
    first, _ = seam_profile(image, (True, True))
    rolled, _ = seam_profile(np.roll(image, 20, axis=0), (True, True))
    assert np.roll(first, 20) == pytest.approx(rolled)
    assert np.isfinite(first).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_planted_seams_are_graded_in_order(axis: int, seed: int) -> None:
    image = np.moveaxis(field(seed), axis, 0).copy()
    strengths = (0.1, 0.2, 0.4, 0.8, 1.6)
    for line, strength in zip(LINES, strengths, strict=True):
        image[line:] += strength
    image = np.moveaxis(image, 0, axis)
    ratios = seam_profile(image)[axis][list(LINES)]
    assert (np.diff(ratios) > 0).all()
    assert ratios[-1] > 4
    lines = (LINES, ()) if axis == 0 else ((), LINES)
    check = seam_check(image, *lines)
    found = check.y if axis == 0 else check.x
    assert not check.passes
    assert list(found) == list(LINES) and list(found.values()) == pytest.approx(ratios)
    assert check.worst == pytest.approx(ratios[-1]) and check.mean == pytest.approx(ratios.mean())
    assert not (check.x if axis == 0 else check.y)


def test_stronger_seams_fail_more_clearly() -> None:
    image = field(3)
    typical = np.abs(np.diff(image, axis=0)).mean()
    worst = []
    for strength in (0.0, 1.0, 2.0, 4.0, 8.0):
        seamed = image.copy()
        seamed[256:] += strength * typical
        check = seam_check(seamed, LINES, LINES)
        assert check.passes == (strength == 0), (strength, check)
        worst.append(check.worst)
    assert worst == sorted(worst) and worst[-1] > 4 * worst[0]


@pytest.mark.parametrize("seed", range(5))
def test_smooth_fields_and_noise_pass(seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((SIZE, SIZE, 3))
    textured = np.where(field(seed) > 0, noise, 0.1 * noise)
    for image in (field(seed), noise, textured):
        check = seam_check(image, LINES, LINES)
        assert check.passes, check
        assert check.mean == pytest.approx(1, abs=0.1)


def test_tiles_of_independent_noise_levels_are_found() -> None:
    """What tiling without overlap does: each tile is smooth, but its own picture."""
    image = np.concatenate([field(seed)[:128] for seed in range(4)])
    check = seam_check(image, (128, 256, 384), ())
    assert not check.passes and check.mean > 3


def test_the_networks_own_grid_is_neither_a_seam_nor_hides_one() -> None:
    """Every eighth line is drawn more strongly, as by a decoder; a seam is found on top of that and only there."""
    image = field(1)
    typical = np.abs(np.diff(image, axis=0)).mean()
    image += 0.5 * typical * (np.arange(SIZE) // 8 % 2)[:, None, None]
    image += 0.5 * typical * (np.arange(SIZE) // 8 % 2)[None, :, None]
    raw, check = seam_check(image, LINES, LINES), seam_check(image, LINES, LINES, period=8)
    assert raw.mean > 1.05 and check.mean == pytest.approx(1, abs=0.03) and check.passes
    image[256:] += 3 * typical
    assert not seam_check(image, LINES, LINES, period=8).passes
    found = seam_check(image, LINES, LINES, period=8)
    assert max(found.y, key=found.y.__getitem__) == 256 and max(found.x.values()) < found.limit
    with pytest.raises(ValueError, match="period=0 must be at least 1"):
        seam_profile(image, period=0)


def test_ratio_ignores_brightness_and_contrast() -> None:
    image = field(1)
    for scaled in (255 * image, image + 1000.0):
        for a, b in zip(seam_profile(image), seam_profile(scaled), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8)


def test_integer_images_do_not_wrap_round() -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[::2] = 255
    assert seam_profile(image)[0][1:] == pytest.approx(1.0)


def test_flat_images_and_a_seam_in_a_flat_image() -> None:
    flat = np.full((64, 64, 3), 0.3)
    assert seam_check(flat, (32,), (32,)).passes
    flat[32:] += 0.1
    check = seam_check(flat, (32,), (32,))
    assert not check.passes and check.worst == np.inf and check.x == {32: 1.0}


def test_line_zero_counts_only_on_a_wrapped_axis() -> None:
    image = field(2)
    assert list(seam_check(image, (0,), (), (True, False)).y) == [0]
    assert not seam_check(image, (0,), ()).y
    image += np.linspace(0, 4, SIZE)[:, None, None]
    assert not seam_check(image, (0,), (), (True, False)).passes
    assert seam_check(image, (0,), ()).passes and seam_check(image, (0,), ()).worst == 0


def test_impossible_requests() -> None:
    with pytest.raises(ValueError, match=r"lines_x has 512, but lines go from 0 to 511"):
        seam_check(field(0), (), (512,))
    with pytest.raises(ValueError, match=r"image of shape \(2, 9\)"):
        seam_profile(np.zeros((2, 9)))
    with pytest.raises(ValueError, match="every line is a tile line"):
        seam_check(np.zeros((4, 4)), range(4), range(4))


TILES = (128, 256, 384)


def save(path: Path, image: NDArray[np.float64], lines: tuple[int, ...]) -> Path:
    """As `tiledcore generate` does."""
    noted = PngInfo()
    tiling = {"wrap": [False, False], "lines_y": lines, "lines_x": lines, "period": 8}
    noted.add_text("tiledcore", json.dumps({"seed": 0, "tiling": tiling}))
    pixels = np.clip(128 + 30 * image, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=noted)
    return path


def test_command_reads_the_tiling_and_tells_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = field(4)
    assert seams.main([str(save(tmp_path / "good.png", image, LINES))]) == 0
    good = capsys.readouterr().out
    assert "limit" in good and "VISIBLE" not in good
    image[:, 256:] += 1.0
    assert seams.main([str(save(tmp_path / "bad.png", image, LINES))]) == 1
    y, x = capsys.readouterr().out.splitlines()[-2:]
    assert y.split()[:2] == ["y", "5"] and y.endswith("none")
    assert x.split()[:2] == ["x", "5"] and "256" in x and x.endswith("VISIBLE")


def test_command_refuses_images_without_a_tiling(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(SystemExit, match="no tiledcore text chunk"):
        seams.main([str(tmp_path / "plain.png")])
    with pytest.raises(SystemExit):
        seams.main([])


def coloured(tiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[H, W, 3]`` from grey tiles ``[rows, cols, side, side]``."""
    rows, cols, side, _ = tiles.shape
    return np.repeat(tiles.swapaxes(1, 2).reshape(rows * side, cols * side, 1), 3, axis=2)


def test_likeness_is_of_content_and_not_of_its_place() -> None:
    rng = np.random.default_rng(0)
    bins = 16
    levels = (np.arange(16) + 0.5) / bins
    half = np.array([rng.permutation(64) % 2 for _ in range(12)]).reshape(3, 4, 8, 8)  # each tile has as much of both
    assert likeness(coloured(levels[2] + half * (levels[9] - levels[2])), 8) == pytest.approx(1)
    land = np.zeros((3, 4, 8, 8))
    land[:, 2:] = 1  # sea on the left, land on the right: pairs of columns 0 and 1, 2 and 3 share all, others nothing
    pairs = [(a, b) for a, b in product(np.ndindex(3, 4), repeat=2) if max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 1]
    same = np.mean([(a[1] < 2) == (b[1] < 2) for a, b in pairs])
    assert likeness(coloured(levels[2] + land * (levels[9] - levels[2])), 8) == pytest.approx(same)
    # A neighbouring bin is half alike along one channel: 1 2 1 and its neighbour share 1 + 1 of 4.
    red = coloured(levels[2] + 0 * land)
    red[:, 16:, 0] = levels[3]
    assert likeness(red, 8) == pytest.approx(same + 0.5 * (1 - same))
    assert np.isnan(likeness(red[:16, :16], 8))


def test_likeness_counts_every_level_from_0_to_1() -> None:
    image = np.zeros((3, 24, 3))
    image[:, 12:] = 1
    assert 0 < likeness(np.repeat(image, 8, axis=0), 8) < 1 == likeness(np.zeros((24, 24, 3)), 8)


def test_repeats_and_a_lost_structure_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A large image of the native one passes; one whose tiles all show the same fails; and so for an enlargement."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 128)[:, None, None] * np.ones((1, 128, 3)) * [1, 0.5, 0.2]
    native = (ramp + 0.02 * rng.random((128, 128, 3))).clip(0, 1)
    large = (native.repeat(8, 0).repeat(8, 1) + 0.05 * (rng.random((1024, 1024, 3)) - 0.5)).clip(0, 1)
    assert seams.repeats(large, native)[1]
    same = np.tile(native.repeat(2, 0).repeat(2, 1), (4, 4, 1))
    told, good = seams.repeats(same, native)
    assert not good and "REPEATS" in told
    source, image = (x.astype(np.float32) for x in (native, large))
    assert seams.fidelity(image, source)[1]
    assert not seams.fidelity(image[::-1].copy(), source)[1], "upside down"
    tiny = Image.fromarray((native * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BOX)
    smooth = np.asarray(tiny.resize((1024, 1024), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert not seams.fidelity(smooth, source)[1], "less detail than bicubic"
    Image.fromarray((native * 255).astype(np.uint8)).save(tmp_path / "native.png")
    path = save(tmp_path / "image.png", same, LINES)
    assert seams.main([str(path), "--native", str(tmp_path / "native.png")]) == 1
    assert capsys.readouterr().out.rstrip().endswith("REPEATS")

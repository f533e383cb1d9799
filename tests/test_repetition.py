"""Planted repeats must be found in order of strength, in smooth and in rough pictures; chance must be known."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.fft import dctn

from bench.repetition import likeness, repetition, repetition_by_chance


def power_law(seed: int, slope: float, size: int = 512) -> NDArray[np.float64]:
    """A periodic Gaussian field ``[size, size]`` with amplitudes of ``k ** -slope``, unit variance."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((size, size)))
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    k[0, 0] = np.inf
    result = np.fft.irfft2(noise * k**-slope, (size, size))
    return result / result.std()


def test_planted_repeats_are_graded_in_order_and_found_moved() -> None:
    image, found = power_law(0, 1.5), []
    subject = power_law(9, 1.5)[:128, :128]
    for strength in (0.0, 1.0, 1.5, 2.0, 4.0):  # one that is weaker than chance cannot be found
        planted = image.copy()
        planted[:128, :128] += strength * subject
        planted[384:, 256:384] += strength * subject
        found.append(repetition(planted, 128))
    assert found == sorted(found) and found[0] < found[1] - 0.05 and found[0] < 0.4 < 0.85 < found[-1]
    copied = image.copy()
    copied[384:, 256:384] = image[8:136, 16:144]  # one and two of sixteen pixels off
    assert repetition(copied, 128) > 0.98
    touching = image.copy()
    touching[:128, 128:256] = touching[:128, :128]
    assert repetition(touching, 128) < 0.98


def test_smooth_and_rough_pictures_repeat_themselves_by_the_same_chance() -> None:
    means = [np.mean([repetition(power_law(seed, slope), 128) for seed in range(6)]) for slope in (0.5, 1.0, 1.5, 2.0)]
    assert max(means) - min(means) < 0.05 and max(means) < 0.4
    chances = [np.mean([repetition_by_chance(power_law(s, slope), 128) for s in range(6)]) for slope in (0.5, 2.0)]
    assert chances == pytest.approx([means[0], means[-1]], abs=0.05)


@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_a_copy_at_half_strength_is_above_chance_in_smooth_and_rough_pictures(slope: float) -> None:
    image = power_law(1, slope)
    image[384:, 384:] = 0.5 * (image[384:, 384:] + image[:128, :128])
    assert repetition(image, 128) > repetition_by_chance(image, 128) + 0.2


def test_a_copy_that_is_turned_or_mirrored_is_what_chance_looks_for() -> None:
    image = power_law(2, 1.0)
    before = repetition_by_chance(image, 128)
    for turn in (np.flipud, np.fliplr, np.rot90):
        planted = image.copy()
        corner = planted[:128, :128]
        planted[384:, 384:] = np.rot90(corner, 2) if turn is np.rot90 else turn(corner)
        assert repetition(planted, 128) < 0.5
        assert repetition_by_chance(planted, 128) > before + 0.15  # one of three is 1 now


def brute_repetition(image: NDArray[np.float64], side: int) -> float:
    """The definition pair by pair and shift by shift, on tiles that are not shrunk, with scipy's cosine transform."""
    rows, columns = (n // side for n in image.shape)
    tiles = {at: image[side * at[0] :, side * at[1] :][:side, :side] for at in np.ndindex(rows, columns)}
    best = -1.0
    for dy, dx in product(range(-side // 4, side // 4 + 1), repeat=2):
        h, w = side - abs(dy), side - abs(dx)
        here = {at: dctn(tile[max(dy, 0) :, max(dx, 0) :][:h, :w], norm="ortho") for at, tile in tiles.items()}
        there = {at: dctn(tile[max(-dy, 0) :, max(-dx, 0) :][:h, :w], norm="ortho") for at, tile in tiles.items()}
        radius = {(i, j): round(max(h, w) * float(np.hypot(i / h, j / w))) for i, j in np.ndindex(h, w)}
        bins: dict[int, list[float]] = {}
        for at, ring in radius.items():
            power = float(np.mean([part[tile][at] ** 2 for part in (here, there) for tile in tiles]))
            bins.setdefault(ring, []).append(power if at != (0, 0) else 0.0)
        ring_power = {ring: float(np.mean(powers)) for ring, powers in bins.items()}
        floor = 1e-6 * max(ring_power.values())
        scale = np.array([[np.sqrt(ring_power[radius[i, j]] + floor) for j in range(w)] for i in range(h)])
        scale[0, 0] = np.inf
        a, b = ({at: c / scale for at, c in part.items()} for part in (here, there))
        least = [0.1 * np.mean([np.sum(c**2) for c in part.values()]) for part in (a, b)]
        for p, q in product(tiles, tiles):
            if max(abs(p[0] - q[0]), abs(p[1] - q[1])) > 1:
                lengths = max(np.sum(a[p] ** 2), least[0]) * max(np.sum(b[q] ** 2), least[1])
                best = max(best, float(np.sum(a[p] * b[q]) / np.sqrt(lengths)))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_repetition_is_the_definition(seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((24, 32))
    image = noise if seed == 0 else np.cumsum(np.cumsum(noise, 0), 1)
    assert repetition(image, 8, 8) == pytest.approx(brute_repetition(image, 8))


def test_flat_tiles_repeat_nothing() -> None:
    image = power_law(3, 1.0)
    sea = 0.01 * power_law(4, 1.0)[:128, :128]
    image[:128, :128], image[384:, 384:] = sea, sea
    assert repetition(image, 128) < 0.5


def test_repetition_limits() -> None:
    noise = np.random.default_rng(0).standard_normal((96, 96))
    assert np.isnan(repetition(noise[:64, :64], 32))
    tiled = np.tile(noise[:32, :32], (3, 3))
    assert repetition(tiled, 32) == pytest.approx(1)
    assert repetition(np.zeros((96, 96)), 32) == 0
    with pytest.raises(ValueError, match="tile=24 must be a multiple of size=16"):
        repetition(noise, 24)


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

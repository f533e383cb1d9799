"""Regions in tiny pipelines of the real classes, and on the embedded model."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from tilings import CANVAS, MOVING, canvas_mode, still
from tiny import TEXT_WIDTH, tiny_sd, tiny_sdxl
from tiny_transformers import build, call, tiny_flux, tiny_pixart_sigma, tiny_qwen, tiny_sana, tiny_sd3, tiny_z_image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tiledcore import Execution, Region, TiledPipeline, TilingConfig
from tiledcore.compose.regional import Regional
from tiledcore.compose.regions import region_weights
from tiledcore.feature import Features
from tiledcore.hook import tiled
from tiledcore.tiles.denoiser import TileDenoiser

SIDE = 208
BOX = (64, 80, 160, 144)
CONFIGS = {
    "tiles": still(overlap=4),
    "wrap": still(overlap=4, wrap=True),
    "moving": MOVING,
    "one tile": still(tile=32),
}
TILES = CONFIGS["tiles"]


def generate(pipe: Any, tiling: TilingConfig, regions: Any = None, prompt: str = "a cat", **kwargs: Any) -> Tensor:
    execution = Execution(tile_batch=3, guidance_batch=kwargs.pop("guidance_batch", True))
    wrapped = TiledPipeline.from_pipe(pipe, tiling=tiling, execution=execution, fused=kwargs.pop("fused", True))
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return wrapped(prompt, generator=generator, regions=regions, **(arguments | kwargs)).images


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.fixture(params=[tiny_sd, tiny_sdxl, tiny_flux, tiny_sd3, tiny_pixart_sigma])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_a_region_that_is_the_canvas_is_the_image_of_its_prompt(pipe: Any) -> None:
    whole = [Region("the ocean", box=(0, 0, SIDE, SIDE), feather=48)]
    assert_close(generate(pipe, TILES, whole), generate(pipe, TILES, prompt="the ocean"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_region_with_the_global_prompt_changes_nothing(name: str) -> None:
    pipe, tiling = tiny_sd(), CONFIGS[name]
    assert_close(generate(pipe, tiling, [Region("a cat", box=BOX)]), generate(pipe, tiling))
    assert not torch.allclose(generate(pipe, tiling, [Region("ice", box=BOX)]), generate(pipe, tiling), atol=1e-2)


def test_fused_or_not_is_the_same(pipe: Any) -> None:
    regions = [Region("the ocean", box=BOX, seed=3), Region("ice", box=(0, 0, 64, SIDE), weight=0.5)]
    fused = generate(pipe, TILES, regions)
    assert_close(fused, generate(pipe, TILES, regions, fused=False))
    assert not torch.allclose(fused, generate(pipe, TILES), atol=1e-2)


def test_the_prediction_is_that_of_each_prompt_alone_mixed_by_the_shares() -> None:
    """One step of DDIM is affine in the prediction: what is mixed can be read off the latents."""
    pipe, tiling = tiny_sd(), CONFIGS["one tile"]
    regions = [Region("the ocean", box=BOX, feather=40), Region("ice", box=(0, 0, 120, 120), weight=0.7)]
    step: dict[str, Any] = {"num_inference_steps": 1}
    alone = [generate(pipe, tiling, prompt=p, **step) for p in ("a cat", "the ocean", "ice")]
    shares = region_weights(regions, (SIDE // 8, SIDE // 8), 8, (False, False))
    expected = sum(share * image for share, image in zip(shares, alone, strict=True))
    assert_close(generate(pipe, tiling, regions, **step), torch.as_tensor(expected))


@pytest.mark.parametrize(("seed", "count"), [(None, 5), (4, 4)])
def test_only_the_prompts_of_a_tile_are_evaluated(
    seed: int | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    network = TileDenoiser._network

    def spy(forward: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
        evaluated.append(len(inputs) // 2)  # both guidance branches
        return network(forward, inputs, **kwargs)

    monkeypatch.setattr(TileDenoiser, "_network", staticmethod(spy))
    # Four tiles: one is the first region's alone, two have the global prompt alone, and one is shared; or else, where
    # the second region has a seed, tile and all, its own.
    box = (128, 0, 192, 64) if seed is None else (128, 0, 256, 128)
    regions = [Region("the ocean", box=(0, 0, 128, 128), feather=0), Region("ice", box=box, feather=0, seed=seed)]
    pipe = TiledPipeline.from_pipe(tiny_sd(), tiling=still(overlap=0))
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", regions=regions, num_inference_steps=1, height=256, width=256, output_type="latent")
    assert sum(evaluated) == count


@pytest.mark.parametrize("name", ["tiles", "wrap", "moving"])
def test_a_region_with_a_seed_can_be_moved_without_changing(name: str) -> None:
    """Its tiles see nothing else here: the box is whole tiles, without a feather."""
    pipe, side = tiny_sd(), 20  # two tiles that share 12 latent pixels
    config = CONFIGS[name]

    def content(x: int, y: int, seed: int | None) -> Tensor:
        box = (8 * x, 8 * y, 8 * (x + side), 8 * (y + side))
        region = Region("the ocean", box=box, feather=0, seed=seed)
        image = generate(pipe, config, [region], height=240, width=248)
        return image.roll((-y, -x), (2, 3))[:, :, :side, :side]

    here = content(2, 3, seed=1)
    assert_close(content(9, 7, seed=1), here)
    assert not torch.allclose(content(9, 7, seed=None), content(2, 3, seed=None), atol=1e-2)
    if name == "wrap":
        assert_close(content(20, 25, seed=1), here)


def test_a_batch_of_prompts_and_images() -> None:
    pipe, regions = tiny_sd(), [Region("the ocean", box=BOX, seed=2)]

    def run(prompts: list[str], seeds: list[int], **kwargs: Any) -> Tensor:
        wrapped = TiledPipeline.from_pipe(pipe, tiling=TILES)
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments: dict[str, Any] = {"height": 192, "width": 208, "num_inference_steps": 2, "output_type": "latent"}
        return wrapped(prompts, generator=generator, regions=regions, **(arguments | kwargs)).images

    pipe.set_progress_bar_config(disable=True)
    both = run(["a cat", "ice"], [1, 2])
    assert both.shape == (2, 4, 24, 26)
    assert not torch.equal(both[0], both[1])
    assert run(["a cat", "ice"], [1, 2, 3, 4], num_images_per_prompt=2).shape == (4, 4, 24, 26)
    # The second image has its own part of each seed's noise, the first is what it is alone.
    assert_close(both[:1], run(["a cat"], [1]))


def test_a_negative_prompt_stays_the_global_ones() -> None:
    """FLUX evaluates it in a call of its own, in which no tile has another prompt."""
    pipe = tiny_flux()
    guided: dict[str, Any] = {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    whole = [Region("the ocean", box=(0, 0, SIDE, SIDE))]
    assert_close(
        generate(pipe, TILES, whole, **guided),
        generate(pipe, TILES, prompt="the ocean", **guided),
    )


def test_outside_a_seeded_region_the_noise_is_the_pipelines_own(pipe: Any) -> None:
    """Tiles without overlap know nothing of each other: in those that the region does not touch, nothing changes."""
    config, size = still(overlap=0), {"height": 256, "width": 256}
    plain = generate(pipe, config, **size)
    seeded = generate(pipe, config, [Region("a cat", box=(0, 0, 64, 64), seed=9)], **size)
    if seeded.ndim == 3:  # FLUX packs 2x2 latent pixels into tokens, row by row
        plain, seeded = (x.unflatten(1, (16, 16)).permute(0, 3, 1, 2) for x in (plain, seeded))
    half = seeded.shape[-1] // 2
    assert_close(seeded[..., half:], plain[..., half:])
    assert not torch.allclose(seeded[..., : half // 2, : half // 2], plain[..., : half // 2, : half // 2], atol=1e-2)


def test_image_to_image_has_regions_but_no_seeds() -> None:
    pipe = tiny_sd()
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    image = Image.effect_noise((160, 192), 60).convert("RGB")
    kwargs: dict[str, Any] = {"image": image, "height": None, "width": None, "num_inference_steps": 4}
    plain = generate(sibling, TILES, **kwargs)
    changed = generate(sibling, TILES, [Region("the ocean", box=(0, 0, 64, 64))], **kwargs)
    assert changed.shape == plain.shape and not torch.allclose(changed, plain, atol=1e-2)
    with pytest.raises(ValueError, match="image: a region's seed"):
        generate(sibling, TILES, [Region("the ocean", box=(0, 0, 64, 64), seed=1)], **kwargs)


def test_a_pipeline_tiled_by_hand() -> None:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    regions = [Region("the ocean", box=BOX)]
    expected = generate(pipe, TILES, regions)
    kwargs: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "latent"}

    def run() -> Tensor:
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **kwargs).images

    plain = run()
    with tiled(pipe, TILES) as hook:
        before = run()
        with Features.entered([Regional(hook, regions)]):
            assert_close(run(), expected)
            assert_close(run(), expected)
        assert torch.equal(run(), before)
    assert torch.equal(run(), plain)
    assert "encode_prompt" not in vars(pipe)


def test_nothing_of_a_call_is_left_for_the_next_even_after_an_error() -> None:
    pipe = tiny_sd()
    plain = generate(pipe, TILES)
    with pytest.raises(ValueError, match="does not lie inside the canvas of 208x208 px"):
        generate(pipe, TILES, [Region("x", box=(0, 0, 512, 64))])
    assert torch.equal(generate(pipe, TILES), plain)
    first = generate(pipe, TILES, [Region("ice", box=BOX)])
    generate(pipe, TILES, [Region("the ocean", box=(0, 0, 64, 64))])
    assert torch.equal(generate(pipe, TILES, [Region("ice", box=BOX)]), first)
    assert torch.equal(generate(pipe, TILES, []), plain)


def test_prompts_that_cannot_be_replaced_are_refused() -> None:
    pipe = TiledPipeline.from_pipe(build(tiny_z_image), tiling=TILES)
    with pytest.raises(TypeError, match="regions: ZImagePipeline has no prompts that can be replaced"):
        call(pipe, tiny_z_image, (26, 26), regions=[Region("x", box=BOX)])


def test_what_is_no_region_is_named() -> None:
    with pytest.raises(TypeError, match=r"regions\[1\]='ice': must be a tiledcore.Region"):
        generate(tiny_sd(), TILES, [Region("x", box=BOX), "ice"])


# ----------------------------------------------------------------------------- canvas mode


def qwen() -> Any:
    """Qwen-Image with random texts of different lengths in place of its text encoder's."""
    pipe = build(tiny_qwen)

    def embed(prompts: list[str], device: Any) -> tuple[Tensor, Tensor]:
        texts = [torch.randn(len(p), TEXT_WIDTH, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
        masks = [torch.ones(len(p), dtype=torch.long) for p in prompts]
        return pad_sequence(texts, batch_first=True), pad_sequence(masks, batch_first=True)

    pipe._get_qwen_prompt_embeds = embed
    return pipe


def flux() -> Any:
    return build(tiny_flux)


def sd3() -> Any:
    return build(tiny_sd3)


LEFT, RIGHT = (0, 0, 256, 128), (256, 0, 512, 128)
WIDE: dict[str, Any] = {"height": 128, "width": 512}
JOINT = [flux, sd3, qwen]


def one_text(pipe: Any) -> Any:
    """Without what a network takes from the pooled text, which stays the global prompt's."""
    if hasattr(embed := getattr(getattr(pipe, "transformer", None), "time_text_embed", None), "text_embedder"):
        for parameter in embed.text_embedder.parameters():
            parameter.data.zero_()
    return pipe


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl, tiny_pixart_sigma, *JOINT])
@pytest.mark.parametrize(("guidance_batch", "fused"), [(True, True), (False, False)])
def test_canvas_mode_has_regions(
    make: Any, guidance_batch: bool, fused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, tiling = one_text(make()), CANVAS
    options: dict[str, Any] = {"fused": fused, "guidance_batch": guidance_batch, "height": 224}
    plain = generate(pipe, tiling, **options)
    assert_close(generate(pipe, tiling, [Region("a cat", box=BOX)], **options), plain)
    assert not torch.allclose(generate(pipe, tiling, [Region("the ocean", box=BOX)], **options), plain, atol=1e-3)
    whole = generate(pipe, tiling, [Region("the ocean", box=(0, 0, SIDE, 224))], **options)
    if make is not tiny_sdxl:  # its pooled text stays the global prompt's
        assert_close(whole, generate(pipe, tiling, prompt="the ocean", **options))
    assert torch.equal(generate(pipe, tiling, **options), plain)
    assert ("pooled text" in caplog.text) == (make in (tiny_sdxl, flux, sd3))


def test_canvas_mode_masks_the_texts_of_sana() -> None:
    """Random texts with masks in place of its text encoder's."""
    pipe = build(tiny_sana)

    def embed(prompt: Any, max_sequence_length: int, **_: Any) -> tuple[Tensor, Tensor]:
        prompt = [prompt] if isinstance(prompt, str) else prompt
        generators = [torch.Generator().manual_seed(len(p)) for p in prompt]
        texts = [torch.randn(max_sequence_length, TEXT_WIDTH, generator=generator) for generator in generators]
        lengths = torch.tensor([[len(p)] for p in prompt])
        return torch.stack(texts), (torch.arange(max_sequence_length) < lengths).long()

    pipe._get_gemma_prompt_embeds = embed
    size: dict[str, Any] = {"height": 256, "width": 320, "max_sequence_length": 12}
    plain = generate(pipe, canvas_mode(4), **size)
    assert_close(generate(pipe, canvas_mode(4), [Region("a cat", box=BOX)], **size), plain)
    other = generate(pipe, canvas_mode(4), prompt="the ocean", **size)
    assert_close(generate(pipe, canvas_mode(4), [Region("the ocean", box=(0, 0, 320, 256))], **size), other)
    assert not torch.allclose(plain, other, atol=1e-2)


@pytest.mark.parametrize("make", JOINT)
def test_a_region_in_canvas_mode_does_not_know_a_far_ones_prompt(make: Any) -> None:
    """After one step of two layers: tiles of 16, and the second one's halo of 8 is in the other region."""

    def columns(right: str) -> Tensor:
        regions = [Region("a cat", box=LEFT, feather=0), Region(right, box=RIGHT, feather=0)]
        out = generate(pipe, CANVAS, regions, num_inference_steps=1, **WIDE)
        return out if out.ndim == 4 else out.unflatten(1, (8, 32)).permute(0, 3, 1, 2).repeat_interleave(2, 3)

    pipe = make()
    ice, ocean = columns("ice"), columns("the ocean")
    assert torch.equal(ice[..., :16], ocean[..., :16])
    assert torch.equal(ice[..., 16:32], ocean[..., 16:32]) == (make is qwen)  # which has one layer here
    assert not torch.allclose(ice[..., 32:], ocean[..., 32:], atol=1e-3)
    whole = generate(pipe, CANVAS, None, num_inference_steps=1, **WIDE)
    whole = whole if whole.ndim == 4 else whole.unflatten(1, (8, 32)).permute(0, 3, 1, 2).repeat_interleave(2, 3)
    assert_close(ice[..., :16], whole[..., :16])


@pytest.mark.parametrize("make", JOINT)
def test_guidance_and_several_images_in_canvas_mode(make: Any) -> None:
    """The negative prompt stays the global one's, in a call of its own or in the same; texts differ in length."""
    pipe, guided = one_text(make()), {"negative_prompt": "a dog", "height": 224}
    guided |= {} if make is sd3 else {"true_cfg_scale": 3.0}
    boxes = [(0, 0, 96, 224), (96, 0, SIDE, 224)]  # whole tokens
    whole = [Region("the ocean", box=box, feather=0) for box in boxes]
    assert_close(generate(pipe, CANVAS, whole, **guided), generate(pipe, CANVAS, prompt="the ocean", **guided))
    prompts, regions = ["a cat", "a long coast"], [Region("the ocean", box=BOX)]
    count = 1 if make is qwen else 2  # diffusers 0.42 repeats Qwen-Image's masks in another order than its texts
    several = {"prompt": prompts, "num_images_per_prompt": count, "num_inference_steps": 1, "height": 224}
    latents = torch.randn(generate(pipe, CANVAS, **several).shape, generator=torch.Generator().manual_seed(1))
    made = generate(pipe, CANVAS, regions, latents=latents, **several)
    for i, prompt in enumerate(prompts):
        one = slice(count * i, count * i + 1)
        alone = {"prompt": prompt, "num_inference_steps": 1, "height": 224, "latents": latents[one]}
        assert_close(made[one], generate(pipe, CANVAS, regions, **alone))


def test_canvas_mode_names_the_adapter_that_knows_one_text() -> None:
    pipe = tiny_sd()
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    layer.set_processor(IPAdapterAttnProcessor2_0(16, TEXT_WIDTH))
    with pytest.raises(TypeError, match=f"regions: {name}: IPAdapterAttnProcessor2_0 knows one text; remove its"):
        generate(pipe, CANVAS, [Region("the ocean", box=BOX)])


@pytest.mark.parametrize("texts", [["ice", "the ocean", None, "ice"], lambda box: "a long coast"])
def test_tiles_and_regions_of_texts_of_different_lengths(texts: Any) -> None:
    """Qwen-Image pads nothing: shorter texts are masked, and count as they do alone."""
    pipe, size = qwen(), {"height": 256, "width": 256, "num_inference_steps": 1}

    def grid(**more: Any) -> Tensor:
        return generate(pipe, still(overlap=0), **size, **more).unflatten(1, (16, 16))

    made = grid(prompt_for_tile=texts)
    for i in range(4):
        at = np.s_[:, 8 * (i // 2) : 8 * (i // 2) + 8, 8 * (i % 2) : 8 * (i % 2) + 8]
        text = texts(()) if callable(texts) else texts[i]
        assert_close(made[at], grid(prompt=text or "a cat")[at])
    region = grid(regions=[Region("ice", box=(0, 0, 128, 128), feather=0)])
    assert_close(region[:, :8, :8], grid(prompt="ice")[:, :8, :8])


# ----------------------------------------------------------------------------- the embedded model


@pytest.mark.parametrize(
    ("model", "tiling"),
    [("earth", still(tile=32, overlap=0)), pytest.param("earth-flux", canvas_mode(32), marks=pytest.mark.slow)],
)
def test_each_half_has_the_colour_of_its_own_prompt(model: str, tiling: TilingConfig) -> None:
    pipe = TiledPipeline.from_pretrained(model, tiling=tiling)
    pipe.set_progress_bar_config(disable=True)
    regions = [Region("satellite view of desert", box=(256, 0, 512, 256), feather=16)]
    generator = torch.Generator().manual_seed(0)
    image = pipe(
        "satellite view of ocean",
        height=256,
        width=512,
        generator=generator,
        regions=regions,
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="np",
    ).images[0]
    sea, sand = image[:, :224].mean((0, 1)), image[:, 288:].mean((0, 1))
    assert sea[2] > sea[0]  # the sea is blue
    assert sand[0] > 1.2 * sand[2]  # and the desert is not

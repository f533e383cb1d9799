"""Decoding and encoding a torus."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from tilings import still
from tiny import tiny_sd, tiny_vae
from tiny_transformers import tiny_flux

from tiledcore import TiledPipeline
from tiledcore.vae.wrap import Continuation, continuation, decoder_reach, wrapped


def convolutions_only() -> AutoencoderKL:
    """Without what sees the whole canvas: normalisation and attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = tiny_vae()
    vae.decoder.mid_block.attentions = torch.nn.ModuleList([None])
    vae.encoder.mid_block.attentions = torch.nn.ModuleList([None])
    for part in (vae.encoder, vae.decoder):
        for module in part.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.GroupNorm):
                    setattr(module, name, torch.nn.Identity())
    return vae.double()


def decode_turned(vae: Any, z: torch.Tensor, turn: tuple[int, int]) -> torch.Tensor:
    pixels = tuple(-8 * n for n in turn)
    with torch.no_grad():
        return vae.decode(z.roll(turn, (2, 3)), return_dict=False)[0].roll(pixels, (2, 3))


@pytest.mark.parametrize("wrap", [(False, True), (True, False), (True, True)])
def test_convolutions_of_a_torus_do_not_know_where_it_is_cut(wrap: tuple[bool, bool]) -> None:
    vae = convolutions_only()
    z = torch.randn(1, 4, 7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = (3 * wrap[0], 8 * wrap[1])
    with wrapped(vae, continuation(vae, wrap, 8)):
        straight = decode_turned(vae, z, (0, 0))
        torch.testing.assert_close(decode_turned(vae, z, turn), straight, rtol=1e-9, atol=1e-12)
    assert straight.shape == (1, 3, 56, 160)
    assert (decode_turned(vae, z, turn) - straight).abs().max() > 1e-3


def test_the_reach_is_what_the_convolutions_see() -> None:
    vae = convolutions_only()
    z = torch.randn(1, 4, 4, 60, dtype=torch.float64, requires_grad=True)
    image = vae.decode(z, return_dict=False)[0]
    (gradient,) = torch.autograd.grad(image[..., 240:248].sum(), z)
    seen = gradient.abs().sum((0, 1, 2)).nonzero().flatten()
    assert decoder_reach(vae) == max(30 - int(seen[0]), int(seen[-1]) - 30)


def test_encoding_a_torus() -> None:
    vae = convolutions_only()
    x = torch.rand(1, 3, 64, 128, dtype=torch.float64)
    with torch.no_grad(), wrapped(vae, continuation(vae, (False, True), 8)):
        straight = vae.encode(x).latent_dist.mean
        turned = vae.encode(x.roll(64, 3)).latent_dist.mean.roll(-8, 3)
        assert vae.encode(x, return_dict=False)[0].mean.equal(straight)
    assert straight.shape == (1, 4, 8, 16)
    torch.testing.assert_close(turned, straight, rtol=1e-9, atol=1e-12)


def test_bands_of_rows_are_cropped_as_the_whole_is() -> None:
    around = Continuation((3, 2), 8)
    canvas = torch.arange(5 * 6.0).view(1, 1, 5, 6)
    padded = around.pad(canvas).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = canvas.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(around.crop(padded, 8), expected)
    for rows in (1, 5, 24, 64, 100):
        assert torch.equal(torch.cat(list(around.crop_rows(padded.split(rows, 2), 40)), 2), expected)


def test_an_open_canvas_is_left_alone_and_the_vae_is_put_back() -> None:
    vae = tiny_vae()
    with wrapped(vae, continuation(vae, False, 8)):
        assert "decode" not in vars(vae)
    with pytest.raises(KeyError), wrapped(vae, continuation(vae, True, 8)):
        assert "decode" in vars(vae)
        raise KeyError
    assert "decode" not in vars(vae) and "encode" not in vars(vae)
    assert continuation(torch.nn.Identity(), (True, False), 8).reach == (24, 0)


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_a_wrapped_pipeline_decodes_a_torus(make: Any) -> None:
    """The same latents turned half round are the same image turned, but for normalisation."""
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    wrapped_pipe = TiledPipeline.from_pipe(pipe, tiling=still(overlap=4, wrap=(False, True)))
    kwargs: dict[str, Any] = {"height": 128, "width": 256, "num_inference_steps": 1, "output_type": "np"}

    def run() -> Any:
        return wrapped_pipe("a coast", generator=torch.Generator().manual_seed(0), **kwargs).images[0]

    seen: list[torch.Size] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kw: (seen.append(z.shape), decode(z, *args, **kw))[1]
    assert run().shape == (128, 256, 3)
    reach = decoder_reach(pipe.vae)
    assert [tuple(s[-2:]) for s in seen] == [(16, 32 + 2 * reach)]

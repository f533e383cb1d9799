"""Turn a diffusers autoencoder into a list of layers from :mod:`tiledcore.vae.bands`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders import autoencoder_dc
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny, Encoder, EncoderTiny

from tiledcore._diffusers import has_hooks
from tiledcore.vae import dc, kl
from tiledcore.vae.bands import Layer, UnsupportedError, unknown

_LAYERS: dict[type, Callable[[Any], list[Layer]]] = {
    Decoder: kl.decoder,
    Encoder: kl.encoder,
    DecoderTiny: kl.tiny,
    EncoderTiny: kl.tiny,
    autoencoder_dc.Decoder: dc.decoder,
    autoencoder_dc.Encoder: dc.encoder,
}


def unsupported(vae: Any) -> str | None:
    """Why an autoencoder cannot run in exact bands, or None if it can."""
    if type(vae) not in (AutoencoderKL, AutoencoderTiny, AutoencoderDC):
        return f"{type(vae).__name__} is none of AutoencoderKL, AutoencoderTiny and AutoencoderDC"
    try:
        program(vae.decoder)
        program(vae.encoder)
    except UnsupportedError as error:
        return str(error)
    return None


def program(network: Any) -> list[Layer]:
    """The layers of ``vae.decoder`` or ``vae.encoder``.

    Raises:
        UnsupportedError: ``network`` cannot run in bands; the message says why.
    """
    for name, module in network.named_modules():
        if name and has_hooks(module):
            raise UnsupportedError(f"{name} has a hook (sequential or group offload?), which bands would pass by")
    if type(network) not in _LAYERS:
        raise unknown(network)
    return _LAYERS[type(network)](network)

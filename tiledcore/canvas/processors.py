"""Attention processors for diffusers in which every image token attends to its own window of the canvas.

Each keeps the layer's projections, norms and output; only the attention itself differs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiledcore import ops
from tiledcore.canvas.windows import QKV, Box, Canvas, Placed, Rotary, place, rotate
from tiledcore.geometry import Pair
from tiledcore.utils import label


def attend_jointly(
    canvas: Canvas,
    image: QKV,
    text: QKV | None = None,
    rotary: Rotary | None = None,
    kept: list[list[Tensor]] | None = None,
) -> tuple[Tensor, Any]:
    """What image and text tokens attend to: the image sees its window and all text, the text sees everything.

    With several prompts, an image token attends to its window and each text in turn, and the results are mixed by the
    prompts' shares in that token; a text sees itself and the whole image. ``image``: ``[B, N, heads, D]``, not rotated
    yet. ``text``: ``[B, T, heads, D]``, rotated relative to the image's frame. ``kept``: per prompt and image, the
    indices of the text tokens that count as keys; None means all.
    """
    if text is None:
        placed = place(canvas, image, rotary)
        return _attend_image(canvas, placed, placed.inside, None), None
    texts = [QKV(*parts) for parts in zip(*map(canvas.texts, text), strict=True)]
    if kept is None:
        return _attend_texts(canvas, image, texts, rotary)
    outs = []
    for b in range(len(image.q)):  # the op knows no mask: leave out, image by image, the text that does not count
        own = [
            QKV(q[b : b + 1], k[b : b + 1, use[b]], v[b : b + 1, use[b]])
            for (q, k, v), use in zip(texts, kept, strict=True)
        ]
        outs.append(_attend_texts(canvas, QKV(*(t[b : b + 1] for t in image)), own, rotary))
    image_out, text_out = zip(*outs, strict=True)
    return torch.cat(image_out), torch.cat(text_out)


def _attend_texts(canvas: Canvas, image: QKV, texts: list[QKV], rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    placed, size = place(canvas, image, rotary), canvas.level(image.q.shape[1]).canvas
    text_out = torch.cat([_attend_text(one, placed.far_k, image.v) for one in texts], 1)
    if not canvas.prompts:
        return _attend_image(canvas, placed, placed.inside, texts[0]), text_out
    out = torch.zeros_like(image.q).unflatten(1, size)
    for prompt, text in zip(canvas.prompts, texts, strict=True):
        _, share, (rows, columns) = canvas.share(prompt, size, out.device)
        y, x = (inside.start for inside in placed.inside)
        part = (slice(y + rows.start, y + rows.stop), slice(x + columns.start, x + columns.stop))
        own = _attend_image(canvas, placed, part, text).unflatten(1, (rows.stop - rows.start, -1))
        out[:, rows, columns] += own * share[rows, columns, None, None].to(out)
    return out.flatten(1, 2), text_out


def _attend_image(canvas: Canvas, placed: Placed, part: Box, text: QKV | None) -> Tensor:
    """Neighbour attention of the placed image tokens of a box, which all see the text's keys and values too."""
    around, windows = placed.windows.around(part), placed.windows

    def cut(tokens: Tensor, size: Pair, box: Box) -> Tensor:
        return tokens.unflatten(1, size)[:, box[0], box[1]].flatten(1, 2)

    size = (around[0].stop - around[0].start, around[1].stop - around[1].start)
    given: dict[str, Any] = {"canvas": size, "tile": windows.tile, "halo": windows.halo, "wrap": windows.wrap}
    if text is not None:
        far_q = None if placed.far_q is None else cut(placed.far_q, windows.canvas, around)
        given |= {"global_q": far_q, "global_k": text.k, "global_v": text.v}
    near = QKV(*(cut(t, windows.canvas, around) for t in placed.near))
    rows, columns = (slice(p.start - a.start, p.stop - a.start) for p, a in zip(part, around, strict=True))
    with label("attention"):
        out = ops.neighbor_attention(*near, **given, impl=canvas.impl)
    return cut(out, size, (rows, columns))


def _attend_text(text: QKV, image_k: Tensor, image_v: Tensor) -> Tensor:
    keys, values = torch.cat([text.k, image_k], 1), torch.cat([text.v, image_v], 1)
    query, keys, values = (t.transpose(1, 2) for t in (text.q, keys, values))
    return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


def _project(attn: Any, x: Tensor) -> QKV:
    """An attention layer's own projections and norms; fused ones are read in place."""
    parts = attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return _normed(attn, parts, attn.norm_q, attn.norm_k)


def _project_text(attn: Any, x: Tensor) -> QKV:
    apart = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    parts = attn.to_added_qkv(x).chunk(3, -1) if attn.fused_projections else tuple(layer(x) for layer in apart)
    return _normed(attn, parts, attn.norm_added_q, attn.norm_added_k)


def _normed(attn: Any, parts: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> QKV:
    """``[B, tokens, heads * D]`` each, to ``[B, tokens, heads, D]``."""
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in parts)
    return QKV(q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v)


def _split(tokens: QKV, first: int) -> tuple[QKV, QKV]:
    """The first tokens, and the rest."""
    return QKV(*(t[:, :first] for t in tokens)), QKV(*(t[:, first:] for t in tokens))


def _rotated(tokens: QKV, turns: Tensor) -> QKV:
    return QKV(rotate(tokens.q, turns), rotate(tokens.k, turns), tokens.v)


def _output(attn: Any, x: Tensor) -> Tensor:
    """The layer's output projection and dropout, on ``[B, tokens, heads, D]``."""
    x = x.flatten(2)
    for layer in attn.to_out:
        x = layer(x)
    return x


def _no_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)}: canvas mode cannot mask image tokens; pass None"
        )


class SelfProcessor:
    """Self-attention of a UNet's, PixArt's or SD 3.5's image tokens, in place of ``AttnProcessor2_0``."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        _no_mask(attention_mask)
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states: a self-attention layer of canvas mode sees image tokens alone")
        return _output(attn, attend_jointly(self.canvas, _project(attn, hidden_states))[0])


class CrossProcessor:
    """Cross-attention: with several prompts, the layer's own processor runs once per prompt, where that has a share."""

    def __init__(self, canvas: Canvas, inner: Any) -> None:
        self.canvas, self.inner = canvas, inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        canvas = self.canvas
        if encoder_hidden_states is None or not canvas.prompts:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)
        texts, size = canvas.texts(encoder_hidden_states), canvas.level(hidden_states.shape[1]).canvas
        masks = [None] * len(texts) if attention_mask is None else canvas.texts(attention_mask, -1)
        out = torch.zeros_like(hidden_states)
        for prompt, text, mask in zip(canvas.prompts, texts, masks, strict=True):
            at, share, _ = canvas.share(prompt, size, out.device)
            part = self.inner(attn, hidden_states.index_select(1, at), text, mask)
            out.index_add_(1, at, part * share.flatten()[at, None].to(out))
        return out


class JointProcessor:
    """Joint attention of two streams, image and text, without rotations, in place of ``JointAttnProcessor2_0``."""

    def __init__(self, canvas: Canvas, rotary: Rotary | None = None) -> None:
        self.canvas, self.rotary = canvas, rotary

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _no_mask(attention_mask)
        return self.two_streams(attn, hidden_states, _project_text(attn, encoder_hidden_states))

    def two_streams(
        self, attn: Any, hidden_states: Tensor, text: QKV, kept: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer's outputs of image and text; ``text`` is rotated already."""
        image, out = attend_jointly(self.canvas, _project(attn, hidden_states), text, self.rotary, kept)
        out = out.flatten(2)
        return _output(attn, image), out if attn.context_pre_only else attn.to_add_out(out)


class FluxProcessor(JointProcessor):
    """FLUX's double-stream and single-stream attention, in place of ``FluxAttnProcessor``."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _no_mask(attention_mask)

        def turned(text: QKV) -> QKV:
            # The network's own tables hold each angle twice. The image's frame is 0, as the text's is.
            turns = torch.complex(*(table[: text.k.shape[1], ::2].float() for table in image_rotary_emb))
            return _rotated(text, turns.to(hidden_states.device))

        if encoder_hidden_states is not None:
            return self.two_streams(attn, hidden_states, turned(_project_text(attn, encoder_hidden_states)))
        h, w = self.canvas.image().canvas
        text, image = _split(_project(attn, hidden_states), hidden_states.shape[1] - h * w)
        image_out, text_out = attend_jointly(self.canvas, image, turned(text), self.rotary)
        return torch.cat([text_out, image_out], 1).flatten(2)


class QwenProcessor(JointProcessor):
    """Qwen-Image's double-stream attention, in place of ``QwenDoubleStreamAttnProcessor2_0``."""

    rotary: Rotary

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        _no_mask(attention_mask)
        text = _project_text(attn, encoder_hidden_states)
        counts, device = tuple(part.shape[1] for part in self.canvas.texts(text.k)), text.k.device
        # The network's own table starts behind the canvas; each text must stand behind the picture.
        turns = self.canvas.table(
            (device, "text", counts), lambda: self.rotary.text(self.canvas.image(), counts, device)
        )
        return self.two_streams(attn, hidden_states, _rotated(text, turns), self.canvas.text_kept)


class ZImageProcessor(JointProcessor):
    """Z-Image's single-stream attention, in place of ``ZSingleStreamAttnProcessor``, image first."""

    rotary: Rotary

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        h, w = self.canvas.image().canvas
        image, text = _split(_project(attn, hidden_states), h * w)
        if text.k.shape[1]:
            # Relative to the image's frame, which comes after the text and so depends on its length.
            frame = freqs_cis[:, :1, : self.rotary.axes[0] // 2]
            turns = freqs_cis[:, h * w :].clone()
            turns[..., : frame.shape[-1]] *= frame.conj()
            text = _rotated(text, turns)
        kept = None if attention_mask is None else self.canvas.text_kept
        image_out, text_out = attend_jointly(self.canvas, image, text if text.k.shape[1] else None, self.rotary, kept)
        return _output(attn, image_out if text_out is None else torch.cat([image_out, text_out], 1))

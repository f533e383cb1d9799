"""The private names of diffusers, accelerate, transformers and torch.compile that tiledcore uses are still there."""

import importlib
import inspect

import pytest
import torch


def _source(path: str) -> str:
    """The source of a module, or of something in it (``module:name``)."""
    module, _, name = path.partition(":")
    there = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        there = getattr(there, part)
    return inspect.getsource(there)


IMPORTED = {
    "diffusers.models.attention_processor": (
        "AttnProcessor AttnProcessor2_0 FusedAttnProcessor2_0 SlicedAttnProcessor XFormersAttnProcessor "
        "JointAttnProcessor2_0 FusedJointAttnProcessor2_0 XFormersJointAttnProcessor AttnAddedKVProcessor "
        "AttnAddedKVProcessor2_0 SlicedAttnAddedKVProcessor XFormersAttnAddedKVProcessor"
    ),
    "diffusers.models.transformers.transformer_flux": "FluxAttnProcessor",
    "diffusers.models.transformers.transformer_qwenimage": "QwenDoubleStreamAttnProcessor2_0",
    "diffusers.models.transformers.transformer_z_image": "SEQ_MULTI_OF ZSingleStreamAttnProcessor",
    "diffusers.models.embeddings": "PatchEmbed",
    "diffusers.pipelines.flux.pipeline_flux": "calculate_shift",
    "diffusers": (
        "StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionXLPipeline "
        "StableDiffusionXLImg2ImgPipeline StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline FluxPipeline "
        "FluxImg2ImgPipeline"
    ),
}
"""Module -> names in it."""

USED = {
    "diffusers.pipelines.pipeline_utils:DiffusionPipeline": "_execution_device _progress_bar_config",
    "diffusers.pipelines.flux.pipeline_flux:FluxPipeline": "_pack_latents _interrupt default_sample_size",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion:StableDiffusionPipeline": (
        "prepare_extra_step_kwargs"
    ),
    "diffusers.hooks.hooks": "_diffusers_hook",
    "diffusers.schedulers.scheduling_euler_discrete": "_begin_index _step_index begin_index",
    "diffusers.schedulers.scheduling_edm_euler": "precondition_outputs",
    "accelerate.hooks": "_hf_hook",
    "transformers.modeling_utils": "_keep_in_fp32_modules",
}
"""Where they are defined -> attributes that tiledcore reads, looked for in the source."""


@pytest.mark.parametrize("module", IMPORTED)
def test_names_that_are_imported(module: str) -> None:
    there = importlib.import_module(module)
    gone = [name for name in IMPORTED[module].split() if not hasattr(there, name)]
    assert not gone, f"{module} no longer has {', '.join(gone)}: adapt tiledcore/_diffusers.py"


@pytest.mark.parametrize("path", USED)
def test_attributes_that_are_read(path: str) -> None:
    source = _source(path)
    gone = [name for name in USED[path].split() if name not in source]
    assert not gone, f"{path} no longer has {', '.join(gone)}: adapt tiledcore/_diffusers.py"


def test_a_compiled_module_holds_the_original() -> None:
    module = torch.nn.Identity()
    assert getattr(torch.compile(module), "_orig_mod", None) is module, "torch.compile no longer sets _orig_mod"

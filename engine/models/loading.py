"""Loads pipelines of diffusers: built-in ones, folders, hub ids and single files; and what the engine runs of them."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel, DiffusionPipeline, FluxPipeline
from diffusers.utils import is_accelerate_available

from rollflow.errors import ModelError, RequestError, line, said, shown
from rollflow.models import BUILT_IN, FlowModel, adapt, folder, unaided
from rollflow.models.flux import FluxModel
from rollflow.models.text import Size
from rollflow.names import MODELS, SINGLE, check_model, fetched, hub_id

NETWORKS = ("transformer", "transformer_2")
_NEEDED = (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RuntimeError)
_REASON = 160  # characters of why a pipeline was not loaded


def load(name: str | Path, device: torch.device, dtype: torch.dtype, pipeline: str | None = None) -> DiffusionPipeline:
    """A pipeline on a device.

    Args:
        name: a built-in name, a folder that `save_pretrained` wrote, a hub id, or a single file.
        device: where its parts are to be.
        dtype: of its networks.
        pipeline: its class, by name; by default what the folder says. A single file needs it.

    Raises:
        ModelError: nothing there, something that is no pipeline, or a class that diffusers does not have.
    """
    check_model(name)
    kind = DiffusionPipeline if pipeline is None else _class(pipeline)
    path = place(name)
    single = str(name).endswith(SINGLE)
    if single and pipeline is None:
        raise ModelError(
            f"{shown(str(name))} is a single file, which does not say what it is: name its class, as in "
            "pipeline='FluxPipeline' (--pipeline FluxPipeline)"
        )
    if single and "://" not in str(name) and not Path(name).is_file():
        raise ModelError(f"{shown(str(name))}: there is no such file")
    if single and not hasattr(kind, "from_single_file"):
        raise ModelError(
            f"{shown(str(name))}: a {kind.__name__} cannot be loaded from a single file; pass its folder or hub id"
        )
    try:
        made: Any = kind.from_single_file if single else kind.from_pretrained
        parts = {} if single else unaided.networks(Path(path), dtype)
        if parts and pipeline is None:  # `DiffusionPipeline` itself would not take them
            made = _class(class_of(path)).from_pretrained
        return made(str(path), **{"torch_dtype" if single else "dtype": dtype}, **parts).to(device)
    except _NEEDED as error:
        away = "there is no such folder; from the hub: " if hub_id(name) and not Path(name).exists() else ""
        raise ModelError(
            f"{shown(str(name))} cannot be loaded as a pipeline ({away}{_reason(error)}): {MODELS}"
        ) from error


def place(name: str | Path) -> str | Path:
    """What diffusers loads for a model's name: a built-in folder, one below `$ROLLFLOW_MODELS`, or the name itself."""
    if str(name) in BUILT_IN:
        return folder(str(name))
    return name if os.path.exists(name) else fetched(name) or name


def _class(name: object) -> Any:
    """A class of pipelines of diffusers."""
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, DiffusionPipeline):
        return found
    known = [one for one in dir(diffusers) if one.endswith("Pipeline")]
    close = get_close_matches(str(name), known, 3)
    meant = f": did you mean {', '.join(close)}?" if close else ", such as FluxPipeline or WanPipeline"
    raise ModelError(f"pipeline={shown(name)}: diffusers {diffusers.__version__} has no pipeline of this name{meant}")


def _reason(error: BaseException) -> str:
    """Why a pipeline was not loaded, in a few words."""
    text = str(error).strip()
    if "low_cpu_mem_usage" in text and not is_accelerate_available():
        return "it takes accelerate: pip install accelerate"
    text = " ".join(text.splitlines()[0].split()) if text else type(error).__name__
    if len(text) > _REASON:  # whole clauses of it
        ends = [text.rfind(end, 0, _REASON) for end in (". ", "; ", " (", ", ")]
        text = text[: max(ends)] if max(ends) > 0 else text
    return line(text, _REASON)


def class_of(name: str | Path, pipeline: str | None = None) -> str:
    """The name of a pipeline's class, without loading it; empty where that cannot be read."""
    if pipeline is not None or str(name).endswith(SINGLE):
        return pipeline or ""
    try:
        config = DiffusionPipeline.load_config(str(place(name)))
        return str(config.get("_class_name", ""))
    except _NEEDED:
        return ""


def check_options(
    kind: str, *, auto: bool = False, preview: Any = False, attention: str | None = None, compile: str | None = None,
    text_tokens: int | None = None,
) -> None:  # fmt: skip
    """Refuses what is known to do nothing for a class of pipelines, by name.

    Raises:
        RequestError: such an option for what is no FluxPipeline: compile="all", or any of the others.
    """
    if kind in ("", FluxPipeline.__name__):
        return
    asked = {
        "dtype='auto'": auto,
        f"preview={shown(preview)}": preview,
        f"attention={shown(attention)}": attention,
        f"compile={shown(compile)}": compile == "all",
        f"text_tokens={shown(text_tokens)}": text_tokens is not None,
    }
    for option, given in asked.items():
        if given:
            raise RequestError(f"{option}: it is for FluxPipelines, and this is a {kind}; leave it out")


def model(
    pipeline: DiffusionPipeline,
    light: AutoencoderKL | AutoencoderTiny | None = None,
    attention: str | None = None,
    own: Size | None = None,
    text_tokens: int | None = None,
) -> FlowModel:
    """What the engine runs of a pipeline; `own` is the size of requests that name none, where the pipeline has another.

    Raises:
        RequestError: an attention, a light decoder or text tokens for what is no FluxPipeline.
        ModelError: no flow pipeline.
    """
    if isinstance(pipeline, FluxPipeline):
        return FluxModel(pipeline, light, attention, text_tokens)
    kind = type(pipeline).__name__
    check_options(kind, preview=light is not None, attention=attention, text_tokens=text_tokens)
    if own is not None:
        from rollflow.models.pipeline import PipelineModel

        return PipelineModel(pipeline, own=own)
    return adapt(pipeline)


def networks(pipeline: Any) -> list[torch.nn.Module]:
    """The transformers of a pipeline: mostly one, two of one with an expert for each half of the times."""
    found = [getattr(pipeline, name, None) for name in NETWORKS]
    return [one for one in found if isinstance(one, torch.nn.Module)]


def load_light(
    name: str | Path, model: str | Path, device: torch.device, dtype: torch.dtype
) -> AutoencoderKL | AutoencoderTiny:
    """A light decoder: `name`, a folder or a hub id, or where that is empty the `preview` folder of `model`.

    Raises:
        ModelError: nothing there, or something that is no autoencoder.
    """
    path = place(name) if name else Path(place(model)) / "preview"
    if not name and not Path(path).is_dir():
        raise ModelError(
            f"the model {shown(str(model))} has no folder 'preview' with a light decoder: pass the folder or hub id "
            "of an AutoencoderTiny for its latents (madebyollin/taef1 for FLUX.1), or leave preview out"
        )
    try:
        light = AutoModel.from_pretrained(str(path), torch_dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise ModelError(f"{shown(str(path))} is no autoencoder that can be loaded: {said(error)}") from error
    if not isinstance(light, AutoencoderKL | AutoencoderTiny):
        raise ModelError(
            f"{shown(str(path))} is a {type(light).__name__}: a light decoder is an AutoencoderTiny or AutoencoderKL"
        )
    return light

"""What searches should know of checkpoints on the hub, with the source of each number; and files that hold it.

`trusted_from` is measured for the built-in models alone, by `rollflow study fidelity`; no card states it, so that every
other model has the default until a traits file beside it says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rollflow.errors import ModelError, RequestError, line, shown
from rollflow.models import Traits
from rollflow.values import number, whole

FILE = "rollflow.json"
# Of a number: the default of the pipeline's `__call__` or the example of its docstring, both in diffusers 0.42.1; the
# example on the checkpoint's card or in its authors' code; the scheduler's configuration in the checkpoint.
Source = Literal["call", "docstring", "card", "scheduler"]
Number = tuple[float, Source]


class Known(NamedTuple):
    """What is known of a checkpoint; None where nothing is, and the default holds.

    Attributes:
        pipeline: its class in diffusers.
        steps: evaluations of its usual sampler.
        guidance: its usual guidance scale.
        shift: of its usual time grid, where it does not depend on the size.
    """

    pipeline: str
    steps: Number
    guidance: Number | None = None
    shift: Number | None = None

    @property
    def traits(self) -> Traits:
        """As the engine takes them."""
        shift, guidance = (None if one is None else one[0] for one in (self.shift, self.guidance))
        return Traits(int(self.steps[0]), shift=shift, guidance=guidance)


KNOWN: dict[str, Known] = {
    # Few steps: distilled to them.
    "black-forest-labs/FLUX.1-schnell": Known("FluxPipeline", (4, "docstring"), (0.0, "docstring"), (1.0, "scheduler")),
    "black-forest-labs/FLUX.2-klein-4B": Known("Flux2KleinPipeline", (4, "card"), (1.0, "card")),
    "black-forest-labs/FLUX.2-klein-9B": Known("Flux2KleinPipeline", (4, "card"), (1.0, "card")),
    "stabilityai/stable-diffusion-3.5-large-turbo": Known(
        "StableDiffusion3Pipeline", (4, "card"), (0.0, "card"), (3.0, "scheduler")
    ),
    "Tongyi-MAI/Z-Image-Turbo": Known("ZImagePipeline", (8, "docstring"), (0.0, "docstring"), (3.0, "scheduler")),
    "HiDream-ai/HiDream-I1-Fast": Known("HiDreamImagePipeline", (16, "card"), (0.0, "card"), (3.0, "card")),
    "HiDream-ai/HiDream-I1-Dev": Known("HiDreamImagePipeline", (28, "card"), (0.0, "card"), (6.0, "card")),
    # Images.
    "black-forest-labs/FLUX.1-dev": Known("FluxPipeline", (28, "call"), (3.5, "call")),
    "black-forest-labs/FLUX.1-Krea-dev": Known("FluxPipeline", (28, "call"), (4.5, "card")),
    "black-forest-labs/FLUX.2-dev": Known("Flux2Pipeline", (50, "docstring"), (2.5, "docstring")),
    "black-forest-labs/FLUX.2-klein-base-4B": Known("Flux2KleinPipeline", (50, "call"), (4.0, "call")),
    "black-forest-labs/FLUX.2-klein-base-9B": Known("Flux2KleinPipeline", (50, "docstring"), (4.0, "docstring")),
    "stabilityai/stable-diffusion-3-medium-diffusers": Known(
        "StableDiffusion3Pipeline", (28, "call"), (7.0, "call"), (3.0, "scheduler")
    ),
    "stabilityai/stable-diffusion-3.5-medium": Known(
        "StableDiffusion3Pipeline", (40, "card"), (4.5, "card"), (3.0, "scheduler")
    ),
    "stabilityai/stable-diffusion-3.5-large": Known(
        "StableDiffusion3Pipeline", (28, "card"), (3.5, "card"), (3.0, "scheduler")
    ),
    "Qwen/Qwen-Image": Known("QwenImagePipeline", (50, "docstring"), (4.0, "call")),
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": Known(
        "SanaPipeline", (20, "call"), (4.5, "call"), (3.0, "scheduler")
    ),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": Known("SanaPipeline", (20, "card"), (4.5, "card")),
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": Known("SanaPipeline", (20, "card"), (4.5, "card")),
    "Alpha-VLLM/Lumina-Image-2.0": Known("Lumina2Pipeline", (30, "call"), (4.0, "call"), (6.0, "scheduler")),
    "fal/AuraFlow": Known("AuraFlowPipeline", (50, "call"), (3.5, "call"), (1.73, "scheduler")),
    "lodestones/Chroma1-HD": Known("ChromaPipeline", (35, "call"), (5.0, "call")),
    "HiDream-ai/HiDream-I1-Full": Known("HiDreamImagePipeline", (50, "docstring"), (5.0, "docstring"), (3.0, "card")),
    "THUDM/CogView4-6B": Known("CogView4Pipeline", (50, "call"), (5.0, "call")),
    "hunyuanvideo-community/HunyuanImage-2.1-Diffusers": Known("HunyuanImagePipeline", (50, "docstring")),
    "briaai/BRIA-3.2": Known("BriaPipeline", (30, "call"), (5.0, "call")),
    "AIDC-AI/Ovis-Image-7B": Known("OvisImagePipeline", (50, "docstring"), (5.0, "docstring")),
    "meituan-longcat/LongCat-Image": Known("LongCatImagePipeline", (50, "docstring"), (4.5, "docstring")),
    "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers": Known(
        "Kandinsky5T2IPipeline", (50, "docstring"), (3.5, "docstring")
    ),
    # Video.
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Known("WanPipeline", (50, "call"), (5.0, "call"), (3.0, "docstring")),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Known("WanPipeline", (50, "call"), (5.0, "docstring")),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Known("WanPipeline", (40, "card"), (4.0, "card")),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": Known("WanPipeline", (50, "card"), (5.0, "card")),
    "Lightricks/LTX-Video": Known("LTXPipeline", (50, "docstring"), (3.0, "call")),
    "hunyuanvideo-community/HunyuanVideo": Known("HunyuanVideoPipeline", (30, "docstring"), (6.0, "call")),
    "genmo/mochi-1-preview": Known("MochiPipeline", (28, "docstring"), (3.5, "docstring")),
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": Known(
        "Kandinsky5T2VPipeline", (50, "docstring"), (5.0, "docstring")
    ),
    "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers": Known(
        "SkyReelsV2Pipeline", (50, "docstring"), (6.0, "docstring"), (8.0, "docstring")
    ),
    "BestWishYsh/Helios-Base": Known("HeliosPipeline", (50, "call"), (5.0, "docstring")),
}  # fmt: skip


def traits_of(folder: str | Path) -> Traits | None:
    """What the file `rollflow.json` in a model's folder says; None where there is none.

    Raises:
        ModelError: it cannot be read, or says something else.
    """
    file = Path(folder) / FILE
    try:
        if not file.is_file():
            return None
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a ValueError: bytes that are no UTF-8, or a path that is none
        raise ModelError(f"the traits in {shown(str(file))} cannot be read: {line(str(error), 100)}") from error
    return _parsed(file, text)


def write_traits(file: Path, traits: Traits, **measured: Any) -> None:
    """Writes traits, and beside them how they were measured, which nothing reads."""
    given = {"traits": asdict(traits), **({"measured": measured} if measured else {})}
    file.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def _parsed(file: Path, text: str) -> Traits:
    names = [one.name for one in fields(Traits)]
    wanted = f'expected {{"traits": {{...}}}} with any of {", ".join(names)}; see `rollflow study fidelity --traits`'
    try:
        given: Any = json.loads(text)
        found = given.get("traits") if isinstance(given, dict) else None
    except ValueError as error:
        raise ModelError(f"the traits in {shown(str(file))} are no JSON ({line(str(error), 80)}): {wanted}") from error
    if not isinstance(found, dict) or not {*found} <= {*names}:
        what = "nothing" if not isinstance(found, dict) else ", ".join(shown(name, 40) for name in found)
        raise ModelError(f"the traits in {shown(str(file))} hold {line(what, 100)}: {wanted}")
    try:
        return checked(found)
    except RequestError as error:
        raise ModelError(f"the traits in {shown(str(file))} hold a wrong number: {error}") from error


def checked(given: Mapping[str, object]) -> Traits:
    """Traits of numbers by name; those that are left out have their defaults.

    Raises:
        RequestError: one is out of range.
    """
    values = {one.name: given.get(one.name, one.default) for one in fields(Traits)}
    trusted = number("traits.trusted_from", values["trusted_from"], 1)
    guidance = None if values["guidance"] is None else number("traits.guidance", values["guidance"])
    shift = None if values["shift"] is None else number("traits.shift", values["shift"])
    if shift is not None and shift <= 0:
        raise RequestError(f"traits.shift={shown(values['shift'])}: it must be above 0; 1 is the uniform grid")
    return Traits(whole("traits.steps", values["steps"], 1), trusted, shift, guidance)

"""The families of pipelines that are tested, with what was learned of each: data, which a test holds against them."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["image", "video"]
Texts = Literal["fixed", "padded", "grouped", "listed"]
HOW = (
    "tiny pipelines of the true classes, with random weights, on a CPU: velocities of a batch of several prompts and "
    "times agree with the pipeline's own to 2e-6 of the largest element, pixels to 5e-6"
)


class Tested(NamedTuple):
    """A family.

    Attributes:
        name: the pipeline's class, and which of its models.
        kind: what it makes.
        guidance: "embedded", or where classifier-free guidance takes two rows of the network: "s > 1", in
            `u + s (c - u)`, or "s > 0", in `c + s (c - u)`; "norms" keeps the length of each vector, "norms at most"
            only shortens.
        texts: of other lengths in a batch: "fixed", all are equally long; "padded", with a mask; "grouped", apart;
            "listed", each as long as it is.
        note: what else there is to know.
    """

    name: str
    kind: Kind
    guidance: str
    texts: Texts
    note: str = ""


_UNIPC = "UniPC: sampled on its sigmas"
_DPM = "DPM-Solver++: sampled on its sigmas"
TESTED = (
    Tested("FluxPipeline", "image", "embedded", "fixed", "by an adapter of its own: FluxModel"),
    Tested("Flux2KleinPipeline", "image", "s > 1", "fixed"),
    Tested("StableDiffusion3Pipeline", "image", "s > 1", "fixed"),
    Tested("QwenImagePipeline", "image", "s > 1, norms", "padded"),
    Tested("ZImagePipeline", "image", "s > 0", "listed"),
    Tested("SanaPipeline", "image", "s > 1", "fixed", _DPM),
    Tested("Lumina2Pipeline", "image", "s > 1, norms", "fixed"),
    Tested("AuraFlowPipeline", "image", "s > 1", "fixed"),
    Tested("ChromaPipeline", "image", "s > 1", "fixed"),
    Tested("HiDreamImagePipeline", "image", "s > 1", "fixed", _UNIPC),
    Tested("CogView4Pipeline", "image", "s > 1", "grouped"),
    Tested("HunyuanImagePipeline", "image", "s > 1", "fixed", "with a guider that keeps no momentum"),
    Tested("BriaPipeline", "image", "s > 1", "fixed"),
    Tested("Krea2Pipeline", "image", "s > 0", "fixed"),
    Tested("Kandinsky5T2IPipeline", "image", "s > 1", "grouped"),
    Tested("OvisImagePipeline", "image", "s > 1", "fixed"),
    Tested("LongCatImagePipeline", "image", "s > 1, norms at most", "fixed"),
    Tested("PRXPipeline", "image", "s > 1", "fixed", "takes ftfy"),
    Tested("WanPipeline 2.1", "video", "s > 1", "fixed", _UNIPC),
    Tested("WanPipeline 2.2 A14B", "video", "s > 1", "fixed", f"two networks; {_UNIPC}"),
    Tested("WanPipeline 2.2 5B", "video", "s > 1", "fixed", f"a time a token; {_UNIPC}"),
    Tested("SkyReelsV2Pipeline", "video", "s > 1", "fixed", f"takes ftfy; {_UNIPC}"),
    Tested("LTXPipeline", "video", "s > 1", "fixed"),
    Tested("HunyuanVideoPipeline", "video", "embedded", "fixed"),
    Tested("MochiPipeline", "video", "s > 1", "fixed", "its times run the other way"),
    Tested("SanaVideoPipeline", "video", "s > 1", "fixed", _DPM),
    Tested("Kandinsky5T2VPipeline", "video", "s > 1", "grouped"),
)


def markdown() -> str:
    """The families as a table for a README."""
    rows = [("pipeline", "makes", "guidance", "texts of other lengths", ""), ("---",) * 5, *TESTED]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)

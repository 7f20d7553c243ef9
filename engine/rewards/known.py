"""What is known of the weights that rewards use: revision, licence, size and source, of each usual model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Weights on the hub.

    Attributes:
        model: hub id.
        revision: the commit that is taken; None: the latest.
        licence: as its authors name it.
        gigabytes: of the files that are fetched, about.
        source: where this was read.
    """

    model: str
    revision: str | None
    licence: str
    gigabytes: float
    source: str


WEIGHTS: tuple[Known, ...] = (
    Known(
        model="openai/clip-vit-large-patch14",
        revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        licence="none named; the authors' code: MIT",
        gigabytes=1.7,
        source="clip, aesthetic, detect: Radford et al. 2021, arXiv 2103.00020; the commit: public code that pins it",
    ),
    Known(
        model="ttj/sac-logos-ava1-l14-linearMSE",
        revision="1e77fa05081323d99725fc40a9bf9f88180490e7",
        licence="Apache-2.0",
        gigabytes=0.004,
        source="aesthetic: github.com/christophschuhmann/improved-aesthetic-predictor; files and commit: the hub",
    ),
    Known(
        model="google/siglip2-so400m-patch14-384",
        revision="e8e487298228002f3d8a82e0cd5c8ea9c567f57f",
        licence="Apache-2.0",
        gigabytes=4.6,
        source="siglip: Tschannen et al. 2025, arXiv 2502.14786; files: the hub; the commit: public code that pins it",
    ),
    Known(
        model="yuvalkirstain/PickScore_v1",
        revision="a4e4367c6dfa7288a00c550414478f865b875800",
        licence="none named",
        gigabytes=3.9,
        source="pickscore: Kirstain et al. 2023, arXiv 2305.01569; the commit: public code that pins it",
    ),
    Known(
        model="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        licence="MIT",
        gigabytes=0.004,
        source="pickscore and hps: its processor and tokenizer alone; the commit: public code that pins it",
    ),
    Known(
        model="xswu/HPSv2",
        revision="697403c78157020a1ae59d23f111aa58ced35b0a",
        licence="Apache-2.0",
        gigabytes=2.0,
        source="hps: Wu et al. 2023, arXiv 2306.09341; a torch pickle a version; the commit: public code that pins it",
    ),
    Known(
        model="MizzenAI/HPSv3",
        revision="4f81e3e09edd82fe3c5f636444c721b592a735ca",
        licence="Apache-2.0; the authors' code: MIT",
        gigabytes=16.6,
        source="hpsv3: Ma et al. 2025, arXiv 2508.03789; the commit: public code that pins it",
    ),
    Known(
        model="Qwen/Qwen2-VL-7B-Instruct",
        revision="eed13092ef92e448dd6875b2a00151bd3f7db0ac",
        licence="Apache-2.0",
        gigabytes=0.012,
        source="hpsv3: its configuration and tokenizer alone; the commit: public code that pins it",
    ),
    Known(
        model="zai-org/ImageReward",
        revision="5736be03b2652728fb87788c9797b0570450ab72",
        licence="Apache-2.0",
        gigabytes=1.8,
        source="imagereward: Xu et al. 2023, arXiv 2304.05977; a torch pickle; the commit: public code that pins it",
    ),
    Known(
        model="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        licence="Apache-2.0",
        gigabytes=0.001,
        source="imagereward: its tokenizer alone; the commit: public code that pins it",
    ),
    Known(
        model="facebook/dinov2-base",
        revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        licence="Apache-2.0",
        gigabytes=0.35,
        source="similarity: Oquab et al. 2023, arXiv 2304.07193; the commit: the table of embeddings-benchmark/mteb",
    ),
    Known(
        model="timm/vgg16.tv_in1k",
        revision="b8d8aa2dd860af9233c8c67385a8097fd6c35d3f",
        licence="BSD-3-Clause",
        gigabytes=0.55,
        source="lpips: torchvision's VGG16_Weights.IMAGENET1K_V1; the commit: public code that pins it",
    ),
    Known(
        model="vivym/lpips",
        revision="270571f1fb2a2c4c5f920cec96cd87838c345982",
        licence="BSD-2-Clause of the authors; of the copy Apache-2.0",
        gigabytes=0.00001,
        source="lpips: github.com/richzhang/PerceptualSimilarity, v0.1; files and commit: the hub",
    ),
    Known(
        model="Qwen/Qwen2.5-VL-7B-Instruct",
        revision="cc594898137f460bfe9f0759e9844b3ce807cfb5",
        licence="Apache-2.0",
        gigabytes=16.6,
        source="vqa: Bai et al. 2025, arXiv 2502.13923; the commit: public code that pins it",
    ),
    Known(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        revision="66285546d2b821cf421d4f5eb2576359d3770cd3",
        licence="Qwen Research License: no commercial use",
        gigabytes=7.5,
        source="vqa: Bai et al. 2025, arXiv 2502.13923; the commit: public code that pins it",
    ),
    Known(
        model="zhiqiulin/clip-flant5-xxl",
        revision=None,
        licence="Apache-2.0",
        gigabytes=22.9,
        source="vqa: Lin et al. 2024, arXiv 2404.01291; torch pickles; files: the hub",
    ),
    Known(
        model="zhiqiulin/clip-flant5-xl",
        revision="3b4a6b1b618f4e286f5353b5b5147a3ae7d9ec55",
        licence="Apache-2.0",
        gigabytes=6.3,
        source="vqa: Lin et al. 2024, arXiv 2404.01291; torch pickles; files and commit: the hub",
    ),
    Known(
        model="openai/clip-vit-large-patch14-336",
        revision="ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
        licence="none named; the authors' code: MIT",
        gigabytes=0.00001,
        source="vqa: of CLIP-FlanT5 the configuration of its tower alone; the commit: public code that pins it",
    ),
    Known(
        model="IDEA-Research/grounding-dino-base",
        revision="12bdfa3120f3e7ec7b434d90674b3396eccf88eb",
        licence="Apache-2.0",
        gigabytes=0.93,
        source="count and detect: Liu et al. 2023, arXiv 2303.05499; the commit: public code that pins it",
    ),
    Known(
        model="google/owlv2-base-patch16-ensemble",
        revision="cfd3195ba4ea9592eec887ded089f4c08eff231d",
        licence="Apache-2.0",
        gigabytes=0.62,
        source="count and detect: Minderer et al. 2023, arXiv 2306.09683; the commit: public code that pins it",
    ),
    Known(
        model="facebook/sam-vit-base",
        revision="70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
        licence="Apache-2.0",
        gigabytes=0.38,
        source="count and detect, masks: Kirillov et al. 2023, arXiv 2304.02643; files and commit: the hub",
    ),
)


def revision(model: str) -> str | None:
    """The pinned revision of a model, None where none is known."""
    return next((one.revision for one in WEIGHTS if one.model == model), None)

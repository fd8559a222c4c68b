"""The paper's numbers that our copy holds, by table; what it does not hold is not here.

Kang et al., CVPR 2025 (arXiv 2503.06287). Percent, as printed there. REC is Acc@0.5, RES is cIoU.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = (
    "refcoco-val",
    "refcoco-testA",
    "refcoco-testB",
    "refcoco+-val",
    "refcoco+-testA",
    "refcoco+-testB",
    "refcocog-val",
    "refcocog-test",
)
"""The columns of the paper's REC and RES tables, in its order (RefCOCO and RefCOCO+ UNC, RefCOCOg UMD)."""

REASON_SPLITS = ("reasonseg-val", "reasonseg-test")


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper, with what it reports of it.

    Args:
        rec, res: by `SPLITS`; None where our copy has no numbers.
        reasonseg: cIoU by `REASON_SPLITS`.
        heads: its three localization heads (Fig. 6a), LAYER-HEAD.
        tau: the threshold of criterion 1 (Fig. 3).
    """

    name: str
    rec: tuple[float, ...] | None = None
    res: tuple[float, ...] | None = None
    reasonseg: tuple[float, float] | None = None
    heads: tuple[str, ...] = ()
    tau: float | None = None


MODELS: dict[str, PaperModel] = {
    "llava-hf/llava-1.5-7b-hf": PaperModel(
        "LLaVA-1.5-7B",
        rec=(86.5, 89.8, 80.2, 80.1, 86.3, 71.9, 82.3, 83.0),
        res=(74.2, 76.5, 70.4, 62.5, 65.2, 56.0, 64.2, 68.1),
        reasonseg=(52.4, 48.7),
        heads=("L14H24", "L14H13", "L14H26"),
        tau=0.24,
    ),
    "llava-hf/llava-1.5-13b-hf": PaperModel(
        "LLaVA-1.5-13B",
        rec=(87.2, 90.0, 83.3, 82.7, 88.5, 74.0, 84.3, 85.5),
        res=(76.1, 78.9, 72.8, 64.1, 67.1, 57.3, 67.7, 69.0),
        reasonseg=(60.5, 49.9),
        heads=("L15H39", "L16H30", "L7H2"),
    ),
    "deepseek-community/deepseek-vl-7b-chat": PaperModel(
        "DeepSeek-VL-7B",
        rec=(85.3, 87.2, 81.0, 77.8, 83.9, 73.5, 81.1, 82.8),
        res=(73.9, 76.6, 70.7, 63.1, 66.1, 56.5, 64.0, 68.9),
    ),
    "deepseek-community/deepseek-vl-1.3b-chat": PaperModel(
        "DeepSeek-VL-1.3B",
        rec=(73.2, 77.7, 70.7, 62.0, 66.7, 57.1, 65.2, 69.3),
        res=(56.3, 57.0, 52.7, 51.2, 55.5, 49.2, 52.3, 55.8),
    ),
}
"""By Hugging Face id of the converted checkpoint."""

HEAD_COUNT_RES = {1: 64.5, 2: 66.0, 3: 67.1, 4: 65.4, 5: 58.9}
"""Tab. 4: RES by the number of heads, averaged over the paper's ten models."""

CRITERIA = {
    ("criterion 1", "fixed"): (23.9, 19.3),
    ("criterion 2", "fixed"): (31.3, 25.7),
    ("both", "fixed"): (87.2, 76.1),
    ("both", "greedy"): (67.4, 63.8),
}
"""Tab. 5: (REC, RES) of LLaVA-1.5-13B on RefCOCO val, by criteria and by how heads are chosen."""

SMOOTHING_SIGMA = {0.0: 85.5, 0.8: 87.2, 1.0: 87.2, 1.8: 84.3}
"""Tab. 8: REC of LLaVA-1.5-13B on RefCOCO val by sigma, with the kernel of 7."""

SMOOTHING_KERNEL = {1: 85.5, 7: 87.2}
"""Tab. 8: the same by kernel size, with sigma 1."""

LEAST_RHO = 0.7
"""Fig. 6b: the Spearman correlation is above this for every model of the paper, with p < 0.001."""

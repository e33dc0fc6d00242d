"""List organs in the order of label values, and tissues with their Hounsfield units."""

from __future__ import annotations

# fmt: off
BTCV = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland",
)
FLARE22 = (
    "background", "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
    "left adrenal gland", "gallbladder", "esophagus", "stomach", "duodenum", "left kidney",
)
LABEL_SETS = {"btcv": BTCV, "flare": FLARE22}
ORGANS = (*BTCV, "duodenum")
ABSENT = {"gallbladder": 0.15, "right kidney": 0.03, "left kidney": 0.03, "spleen": 0.04}  # chance of earlier surgery

# Mean HU without contrast and in the late arterial, portal venous and delayed phase; standard deviation of the texture.
TISSUES = {
    "air": (-1000, -1000, -1000, -1000, 0), "table": (-120, -120, -120, -120, 15), "gas": (-960, -960, -960, -960, 10),
    "skin": (20, 25, 30, 30, 10), "fat": (-104, -103, -102, -102, 9), "muscle": (52, 57, 62, 62, 9),
    "lung": (-850, -845, -840, -840, 45), "cortical bone": (650, 650, 655, 655, 90),
    "trabecular bone": (150, 155, 160, 160, 40), "cartilage": (95, 95, 100, 100, 15), "disc": (75, 75, 80, 80, 8),
    "spinal canal": (25, 28, 30, 30, 6), "arterial blood": (42, 310, 160, 112, 4), "caval blood": (40, 85, 140, 110, 6),
    "portal blood": (41, 130, 178, 116, 4), "hepatic blood": (41, 62, 165, 114, 3), "liver": (56, 68, 108, 92, 6),
    "spleen": (48, 130, 121, 94, 6), "pancreas": (40, 104, 94, 74, 16), "adrenal": (28, 74, 68, 50, 5),
    "renal cortex": (34, 185, 178, 140, 7), "renal medulla": (31, 75, 145, 148, 7), "urine": (6, 8, 14, 330, 4),
    "bile": (9, 9, 10, 10, 3), "gallstone": (190, 190, 190, 190, 30), "cyst": (6, 6, 7, 7, 3),
    "metastasis": (38, 52, 66, 66, 8), "gut wall": (38, 84, 90, 74, 8), "oesophageal wall": (40, 58, 64, 60, 8),
    "chyme": (22, 22, 24, 26, 16), "stool": (15, 15, 15, 15, 55),
    "water": (4, 4, 5, 5, 5), "soft chyme": (42, 42, 43, 44, 10), "food": (25, 25, 26, 26, 40),
    "thin oral contrast": (170, 170, 170, 170, 18), "oral contrast": (290, 290, 290, 290, 25),
    "dense oral contrast": (460, 460, 460, 460, 40), "soft stool": (46, 46, 47, 47, 9),
    "dense stool": (75, 75, 75, 75, 25), "dense bile": (48, 48, 49, 50, 6), "ascites": (10, 10, 11, 12, 4),
    "stranding": (-45, -42, -40, -40, 18), "adrenal nodule": (12, 50, 58, 34, 6),
    "hypervascular mass": (38, 145, 100, 78, 14),
    "thrombus": (42, 44, 46, 46, 6), "calcification": (620, 620, 620, 620, 120), "metal": (3000, 3000, 3000, 3000, 0),
}
TISSUES |= {  # of the chest
    "myocardium": (42, 100, 112, 92, 8), "pulmonary blood": (41, 230, 155, 112, 5), "atelectasis": (40, 78, 88, 76, 9),
    "effusion": (12, 12, 13, 13, 4), "thyroid": (105, 170, 160, 140, 12), "gland": (32, 42, 50, 48, 22),
    "lymph node": (38, 72, 86, 74, 6),
}
# fmt: on
TISSUE_ID = {name: number for number, name in enumerate(TISSUES)}


def label_names(label_set: str) -> tuple[str, ...]:
    """Return the organ names of a label set, in order of label value. ValueError if the set is unknown."""
    if label_set not in LABEL_SETS:
        raise ValueError(f"label_set is {label_set!r}; choose one of {', '.join(LABEL_SETS)}")
    return LABEL_SETS[label_set]

"""Spell names of organs in one way, and for names of files."""

from __future__ import annotations

import re

_SIDES = ("left", "right")
# British spelling, and what data sets call the organs: AMOS, BTCV, TotalSegmentator, WORD.
_SPELLINGS = {
    "adrenal": "adrenal gland",
    "arota": "aorta",
    "gall bladder": "gallbladder",
    "ivc": "inferior vena cava",
    "oesophagus": "esophagus",
    "portal and splenic veins": "portal vein and splenic vein",
    "postcava": "inferior vena cava",
    "suprarenal gland": "adrenal gland",
    "vena cava inferior": "inferior vena cava",
}


def canonical_name(name: str) -> str:
    """Return an organ's name as the bundles spell it: in small letters with single spaces, and with its side first.

    Capitals, hyphens, underscores, the place of the side and known spellings do not matter: `"Adrenal_gland-LEFT"` is
    `"left adrenal gland"`, and `"GallBladder"` is `"gallbladder"`. A name that is not known is treated alike.
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("&", " and ")
    words = re.findall(r"[^\s_-]+", apart.casefold())
    organ = " ".join(word for word in words if word not in _SIDES)
    return " ".join([*(word for word in words if word in _SIDES), _SPELLINGS.get(organ, organ)]).strip()


def name_in_files(name: str) -> str:
    """Return a label's name for names of files and curves: letters, digits, `_`, `.` and `-`, without a folder."""
    return re.sub(r"[^\w.-]+", "_", name)

"""Draw originals beside their adversarial versions, from two datasets of a store.

python docs/make_picture.py STORE/datasets/clean/VERSION STORE/datasets/other/VERSION docs/picture.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stages.shard import Shard, unpack

SIDE, GAP, COLUMNS, LINE = 112, 10, 8, 17
INK, PAPER = (30, 30, 30), (255, 255, 255)


def first_shard(folder: Path) -> tuple[Shard, list[str]]:
    """The first training shard of a dataset, and its class names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return unpack("train-000000", (folder / "train-000000.tar").read_bytes(), manifest["channels"]), manifest["classes"]


def tile(pixels_HWC: np.ndarray) -> Image.Image:
    """One image, enlarged without smoothing."""
    rgb = np.repeat(pixels_HWC, 3, axis=2) if pixels_HWC.shape[2] == 1 else pixels_HWC
    return Image.fromarray(rgb).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def magnified(clean: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The difference, ten times, round grey."""
    return np.clip(127.5 + 10 * (moved.astype(float) - clean.astype(float)), 0, 255).astype(np.uint8)


def main(clean_folder: str, moved_folder: str, out: str) -> None:
    """Write the picture."""
    clean, names = first_shard(Path(clean_folder))
    moved, _ = first_shard(Path(moved_folder))
    place = {int(index): i for i, index in enumerate(clean.index)}
    picked = [i for i in range(len(moved)) if moved.attack["success"][i]][:COLUMNS]
    height = 3 * (SIDE + LINE + GAP) + GAP
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, height), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, i in enumerate(picked):
        before, after = clean.images()[place[int(moved.index[i])]], moved.images()[i]
        rows = [
            (before, f"{names[moved.source_label[i]]}"),
            (magnified(before, after), f"10 x, L2 {moved.attack['l2'][i]:.2f}"),
            (after, f"labelled {names[moved.label[i]]}"),
        ]
        for row, (pixels, text) in enumerate(rows):
            left, top = GAP + column * (SIDE + GAP), GAP + row * (SIDE + LINE + GAP)
            sheet.paste(tile(pixels), (left, top))
            draw.text((left, top + SIDE + 1), text, INK, font)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

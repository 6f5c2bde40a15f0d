"""A contact sheet: frames of a video in a grid, each with its time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from serve_app.errors import MediaError
from serve_app.media.pictures import write_poster

SHEET_FRAMES = 12
COLUMNS = 4
SHEET_WIDTH = 1280
"""Pixels, about: four columns of 320."""
GAP = 4
FONT_PX = 16


def write_contact_sheet(frames: Mapping[int, np.ndarray], path: Path, *, fps: int) -> None:
    """Write the frames (uint8 RGB [height, width, 3], all of one size, by index) as one JPEG, in order, with their times.

    Raises MediaError, also where there are no frames.
    """
    if not frames:
        raise MediaError("there are no frames for the contact sheet")
    height, width = next(iter(frames.values())).shape[:2]
    columns = min(COLUMNS, len(frames))
    cell = (SHEET_WIDTH // COLUMNS, round(SHEET_WIDTH / COLUMNS * height / width))
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + GAP) - GAP, rows * (cell[1] + GAP) - GAP))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for place, index in enumerate(sorted(frames)):
        x, y = place % columns * (cell[0] + GAP), place // columns * (cell[1] + GAP)
        sheet.paste(Image.fromarray(frames[index]).resize(cell, Image.Resampling.LANCZOS), (x, y))
        corner = (x + 6, y + cell[1] - 6)
        draw.text(corner, clock(index / fps), "white", font, anchor="ls", stroke_width=2, stroke_fill="black")
    write_poster(np.asarray(sheet), path)


def clock(time_s: float) -> str:
    """Seconds as minutes, seconds and hundredths: `1:02.50`."""
    minutes, hundredths = divmod(round(time_s * 100), 6000)
    return f"{minutes}:{hundredths // 100:02}.{hundredths % 100:02}"

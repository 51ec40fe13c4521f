"""Colors that both figures and pages use."""

from __future__ import annotations

from functools import cache

import numpy as np

INK = "#52606d"  # lines and marks that must be seen on white and on near black


@cache
def tap_colors(kernel_size: tuple[int, int], taps: int | None = None) -> np.ndarray:
    """One color per tap, telling its regular place: the hue is its direction from the center, which is gray.

    Taps next to each other differ in lightness too, as 24 hues alone are hard to tell apart. All are of middle
    lightness (OKLCH), to be seen on white and on black.

    Args:
        kernel_size: Taps (rows, columns).
        taps: How many there are, if they are free: each then has a color of its own, which tells no place.

    Returns:
        RGB in 0 to 1, [T, 3], in the order of the taps; read-only.
    """
    rows, cols = kernel_size
    if taps is not None and taps != rows * cols:
        rows, cols = 1, taps
    row, col = np.divmod(np.arange(rows * cols), cols)
    y, x = row - (rows - 1) / 2, col - (cols - 1) / 2
    far = np.hypot(y, x)
    ring = np.maximum(abs(y), abs(x))
    lightness = 0.62 + 0.07 * np.where((row + col) % 2, 1, -1)
    chroma = np.where(far < 0.1, 0.0, 0.15)
    # Rings are turned against each other, so that a tap and the one behind it differ in hue.
    colors: np.ndarray = _oklch_to_rgb(lightness, chroma, np.arctan2(y, x) + 0.5 + 0.35 * ring)
    colors.flags.writeable = False
    return colors


def hex_color(rgb: np.ndarray) -> str:
    """An RGB color in 0 to 1 as "#rrggbb"."""
    return "#" + "".join(f"{round(255 * float(value)):02x}" for value in rgb)


def _oklch_to_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Oklab in polar coordinates (B. Ottosson, 2020) to sRGB in 0 to 1, clipped to what a screen can show."""
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])
    to_cone = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = np.clip(np.array(to_linear) @ (np.array(to_cone) @ lab) ** 3, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055).T

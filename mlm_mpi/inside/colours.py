"""Scales of colours on which equal steps look equal: straight lines in Oklab.

Source: Ottosson, "A perceptual color space for image processing", 2020, with its matrices.
"""

import numpy as np

LEVELS = 256
_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

# lightness, a (green to red), b (blue to yellow); the ends of a diverging scale are equally light, blue and orange
_LIGHT, _DARK = (1.0, 0.0, 0.0), (0.22, 0.0, -0.01)
_SCALES = {
    "amount": {"light": [_LIGHT, (0.38, -0.02, -0.13)], "dark": [_DARK, (0.90, -0.05, -0.06)]},
    "sign": {
        "light": [(0.55, -0.04, -0.16), _LIGHT, (0.55, 0.11, 0.10)],
        "dark": [(0.72, -0.05, -0.13), _DARK, (0.72, 0.09, 0.12)],
    },
}


def scale(kind: str, theme: str) -> np.ndarray:
    """`kind`: "amount" from nothing to all, or "sign" from against to for, nothing in the middle; `theme`: of the page,
    "light" or "dark", whose paper is nothing. Shapes: -> (256, 3) uint8."""
    stops = np.array(_SCALES[kind][theme])
    places = np.linspace(0, 1, len(stops))
    lab = np.stack([np.interp(np.linspace(0, 1, LEVELS), places, stops[:, i]) for i in range(3)], axis=1)
    linear = np.clip(((lab @ _TO_LMS.T) ** 3) @ _TO_RGB.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)

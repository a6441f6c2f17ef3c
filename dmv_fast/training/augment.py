"""What the camera and the codec do to a crop: colour, light, blur, noise, compression. Nothing moves here."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dmv_fast.training.geometry import smooth_path
from dmv_fast.training.synth import Shot, smear
from dmv_fast.vision.crop import CROP_SIZE

# shares of the samples
GRAY = 0.1
BLUR = 0.12
NOISE = 0.15
COMPRESS = 0.4
SHADE = 0.2
# shares of the frames
FRAME_BLUR = 0.08
FRAME_SMEAR = 0.1


@dataclass(frozen=True)
class Look:
    """How one camera sees one sample: chosen once, with a slow drift of the light from frame to frame."""

    flip: bool
    gray: bool
    gains: np.ndarray  # (N, 3) colour gains
    gammas: np.ndarray  # (N,)
    shade: np.ndarray | None  # (N, 2) slope of the light over the crop
    sigma: float  # standing blur, pixels of the drawn crop; 0: none
    noise: float  # deviation, grey levels; 0: none
    quality: int | None  # JPEG quality; None: not compressed


def random_look(rng: np.random.Generator, times: np.ndarray) -> Look:
    """A look for frames at `times` (N,)."""
    drift = smooth_path(rng, times, 7)
    tint = rng.normal(0, 0.05, 3) + rng.normal(0, 0.12)
    common = drift[:, :1] * (0.15 if rng.random() < 0.3 else 0.05)
    gains = np.exp(tint + common + drift[:, 1:4] * 0.02)
    gammas = np.exp(rng.normal(0, 0.1) + drift[:, 4] * 0.06)
    return Look(
        flip=bool(rng.random() < 0.5),
        gray=bool(rng.random() < GRAY),
        gains=gains,
        gammas=gammas,
        shade=rng.normal(0, 0.2, 2) + drift[:, 5:] * 0.3 if rng.random() < SHADE else None,
        sigma=float(rng.uniform(0.4, 1.3)) if rng.random() < BLUR else 0.0,
        noise=float(rng.uniform(2, 9)) if rng.random() < NOISE else 0.0,
        quality=int(rng.integers(20, 90)) if rng.random() < COMPRESS else None,
    )


def develop(shot: Shot, look: Look, frame: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn crop as frame `frame` of a sample: `expose`, then enlarge -> (256, 256, 3) uint8 BGR."""
    crop = expose(shot, look, frame, rng)
    if crop.shape[0] < CROP_SIZE:
        crop = cv2.resize(crop, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR)
    return crop


def expose(shot: Shot, look: Look, frame: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn picture (H, W, 3) uint8 BGR as the camera and the codec leave it.

    Blur and compression act at the drawn resolution, the frame's own when it is enlarged later, as they do in
    a video; what is beyond the frame stays even, as in tracking. The flip is left to the caller, who owns
    the boxes.
    """
    crop = shot.crop
    size = min(crop.shape[0], CROP_SIZE)
    if rng.random() < FRAME_SMEAR:
        crop = smear(crop, np.clip(rng.normal(0, 0.03, 2), -0.05, 0.05) * size)
    sigma = look.sigma
    if rng.random() < FRAME_BLUR:
        sigma = float(np.hypot(sigma, rng.uniform(0.5, 2.0) * size / CROP_SIZE))
    if sigma > 0:
        crop = cv2.GaussianBlur(crop, (0, 0), sigma)
    curve = _curve(look.gains[frame], look.gammas[frame])
    crop, fill = cv2.LUT(crop, curve), cv2.LUT(shot.fill[None, None], curve)
    if look.gray:
        crop, fill = _grey(crop), _grey(fill)
    if look.shade is not None:
        crop = _shade(crop, look.shade[frame])
    if look.noise > 0:
        grain = rng.standard_normal((*crop.shape[:2], 1), dtype=np.float32) * look.noise
        crop = np.clip(crop + grain, 0, 255).astype(np.uint8)
    if look.quality is not None:
        data = cv2.imencode(".jpg", crop, (cv2.IMWRITE_JPEG_QUALITY, look.quality))[1]
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert decoded is not None, "it was encoded a line ago"
        crop = decoded
    if shot.outside is not None:
        crop = np.where(shot.outside[..., None], fill, crop)
    return crop


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)


def _curve(gains: np.ndarray, gamma: float) -> np.ndarray:
    """Tone curve as a table (1, 256, 3) uint8; gamma bends it, the gains scale each channel."""
    level = np.linspace(0, 1, 256)[:, None] ** gamma * gains
    return np.clip(level * 255 + 0.5, 0, 255).astype(np.uint8)[None]


def _shade(crop: np.ndarray, slope: np.ndarray) -> np.ndarray:
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in crop.shape[:2])
    light = 1 + np.clip(slope[0] * x[None] + slope[1] * y[:, None], -0.6, 0.6).astype(np.float32)
    return np.clip(crop * light[..., None], 0, 255).astype(np.uint8)

"""The got10k toolkit: a `got10k.trackers.Tracker` for its experiments (extra `eval`)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dmv_fast.tracker import FastDMVTracker, TrackerConfig

try:
    from got10k.trackers import Tracker
    from got10k.utils.viz import show_frame
    from PIL import Image
except ImportError as error:
    raise ImportError(
        f'the got10k adapter cannot import {error.name}: pip install "dmv-fast[eval]" brings the got10k '
        "toolkit and six, which the toolkit imports but does not name"
    ) from error


class GOT10kTracker(Tracker):
    """FastDMVTracker for the toolkit's experiments; after `name`, the arguments are FastDMVTracker's.

    Boxes go in as they are annotated, 1-based or not: a constant shift comes out as it went in. They come out
    as floats. The toolkit runs a tracker once and not three times, since it always gives the same answer.
    """

    def __init__(
        self, name: str = "DMV18", weights: str = "dmv18", k: int | None = None, device: str = "auto",
        dtype: str = "auto", backend: str = "auto", config: TrackerConfig | None = None,
    ):  # fmt: skip
        super().__init__(name, is_deterministic=True)
        self._tracker = FastDMVTracker(weights, k, device, dtype, backend, config)

    def init(self, image: Image.Image, box: Sequence[float]) -> None:
        """image: PIL, of any mode; box: x, y, w, h. Errors as FastDMVTracker.init."""
        self._tracker.init(_bgr(image), box)

    def update(self, image: Image.Image) -> np.ndarray:
        """The next frame -> x, y, w, h as (4,) float64; the last box where the target is not found."""
        return np.array(self._tracker.track(_bgr(image)).box)

    def track(
        self, img_files: Sequence[str], box: Sequence[float], visualize: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """A whole sequence, as the toolkit's own loop, the next image being decoded while one is tracked.

        PIL decodes an image when its pixels are first asked for: in the toolkit's loop, on its clock.
        Here the clock sees the tracker alone, from the decoded image to the box on the host.

        Returns:
            boxes (n, 4) xywh, the first as given, and seconds (n,), the first those of `init`.
        """
        boxes, times = np.zeros((len(img_files), 4)), np.zeros(len(img_files))
        boxes[0] = box
        for i, image in enumerate(_decoded(img_files)):
            start = time.perf_counter()
            if i == 0:
                self.init(image, box)
            else:
                boxes[i] = self.update(image)
            times[i] = time.perf_counter() - start
            if visualize:
                show_frame(image, boxes[i])
        return boxes, times


def _bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(_rgb(image))[:, :, ::-1])


def _rgb(image: Image.Image) -> Image.Image:
    """Of 16 bits the upper 8, as OpenCV reads such a file; PIL alone would make nearly all of it white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")  # a copy, also of one that is RGB already, with its pixels in memory


def _decoded(files: Sequence[str]) -> Iterator[Image.Image]:
    """The images, RGB and decoded, one ahead."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(_open, files[0])
        for file in files[1:]:
            image, ahead = ahead, pool.submit(_open, file)
            yield image.result()
        yield ahead.result()


def _open(file: str) -> Image.Image:
    with Image.open(file) as image:
        return _rgb(image)

"""OpenCV: `TrackerDMV.create()` where `cv2.TrackerCSRT.create()` stood.

A class of its own and no subclass of cv2.Tracker: OpenCV ends the whole process when such an object is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmv_fast.tracker import FastDMVTracker, TrackerConfig


class TrackerDMV(FastDMVTracker):
    """FastDMVTracker, made as OpenCV makes its trackers: `init`, `update` and `getTrackingScore` are its own.

    What cv2.Tracker leaves open is said here: boxes in may be floats, boxes out are rounded and never
    truncated (the tracker itself goes on from the unrounded one), an `update` that returns False repeats the
    last box, and `update` before `init` is a RuntimeError.
    """

    @dataclass
    class Params:
        """FastDMVTracker's arguments. As cv2.TrackerVit.Params(): set fields, then hand it to `create`."""

        weights: str = "dmv18"
        k: int | None = None
        device: str = "auto"
        dtype: str = "auto"
        backend: str = "auto"
        config: TrackerConfig | None = None

    @classmethod
    def create(cls, parameters: Params | None = None) -> TrackerDMV:
        """A new tracker. TypeError, ValueError: parameters that FastDMVTracker does not take."""
        given = cls.Params() if parameters is None else parameters
        if not isinstance(given, cls.Params):
            raise TypeError(f"parameters is {type(given).__name__}; it must be TrackerDMV.Params() or absent")
        return cls(given.weights, given.k, given.device, given.dtype, given.backend, given.config)


TrackerDMV_Params = TrackerDMV.Params
TrackerDMV_create = TrackerDMV.create

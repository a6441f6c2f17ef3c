"""A script for an OpenCV tracker, with DMV in its place: `python examples/opencv_swap.py VIDEO X,Y,W,H`.

Prints a line for each frame after the first: x,y,w,h and whether the target was found. One line of the loop
chooses the tracker; what stood there before is beside it.
"""

from __future__ import annotations

import sys

import cv2

from dmv_fast.adapters.opencv import TrackerDMV


def main(video: str, box: tuple[int, ...]) -> int:
    """Track the box of the first frame to the end of the video; the exit code."""
    capture = cv2.VideoCapture(video)
    ok, frame = capture.read()
    if not ok:
        print(f"{video}: not one frame can be read", file=sys.stderr)
        return 1
    tracker = TrackerDMV.create()  # was: tracker = cv2.TrackerCSRT.create()
    tracker.init(frame, box)
    while True:
        ok, frame = capture.read()
        if not ok:
            return 0
        found, box = tracker.update(frame)
        print(*box, "found" if found else "lost", sep=",")


if __name__ == "__main__":
    try:
        given = tuple(int(v) for v in sys.argv[2].split(","))
    except (IndexError, ValueError):
        print(
            "usage: opencv_swap.py VIDEO X,Y,W,H (whole pixels, the box in the first frame)", file=sys.stderr
        )
        sys.exit(2)
    sys.exit(main(sys.argv[1], given))

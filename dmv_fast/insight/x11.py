"""Lets OpenCV's windows have the events that an X server sends them."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def leave_events_to_qt() -> None:
    """Call it before the process opens its first window; it does nothing where there is nothing to mend.

    Qt, which shows OpenCV's windows, tells Xlib that X's events are Qt's. The library through which it does,
    libX11-xcb, comes with the wheels of opencv-python and is older than libX11 1.7, where that note moved to
    another place of a structure: today's Xlib never sees it, and takes events for itself now and then. A
    window whose first Map and Expose are among them stays black for good. The system's own libX11-xcb, loaded
    for the whole process beforehand, is the one that Qt then finds.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # not installed (Debian: libx11-xcb1): as it would be without this
            ctypes.CDLL("libX11-xcb.so.1", mode=ctypes.RTLD_GLOBAL)

"""A look inside: what a frame's candidates were, shown in a window and recorded (docs/inspect.md)."""

from dmv_fast.insight.watch import Candidate, Insight, Remembered, Watch

__all__ = ["Candidate", "Insight", "Remembered", "Watch"]

"""How a tracker is copied: a second one in the same state, which shares the weights and no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, SupportsIndex

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

    from dmv_fast.runtime.frame import FrameStep


class Cloneable:
    """What FastDMVTracker and MultiTracker have in common: they are copied by `clone`, and do not pickle."""

    frame_step: FrameStep

    def clone(self) -> Self:
        """An independent tracker in the same state; the weights are shared."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.frame_step = self.frame_step.clone()
        other._own_targets()
        return other

    __copy__ = clone  # a shallow one would share the memory: two trackers that spoil each other's

    def __deepcopy__(self, memo: dict) -> Self:
        return self.clone()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a tracker does not pickle, its weights are laid out for this processor; "
            "make one in each process, by the same arguments"
        )

    def _own_targets(self) -> None:
        """Put copies in the place of the targets that a clone shares with its original."""
        raise NotImplementedError

"""Copies of recurrent states at the ends of the latest turns, and how a cache returns to one of them.

A recurrent layer can't be cropped: it returns to a checkpoint. A short convolution records its inputs, and
returns to any length since the last checkpoint.
"""

from collections.abc import Sequence

from kvchat.cache.state_layer import RecurrentState, StateLayer

CHECKPOINTS = 8
"""Turn ends that a model with recurrent layers can return to."""


class StateCheckpoints:
    """The checkpoints of one cache; lengths are tokens of its history."""

    def __init__(self, layers: Sequence[StateLayer]) -> None:
        self.layers = list(layers)
        self.states: dict[int, list[RecurrentState]] = {}
        """History length → a copy of every layer's state there; ascending."""
        self._recorded_from = 0
        """History length at which the layers' records of inputs start."""

    def take(self, length: int) -> None:
        """Makes the current `length` a checkpoint; drops the oldest ones, and the records before it."""
        if not self.layers or not length:
            return
        if length not in self.states:
            self.states[length] = [layer.state() for layer in self.layers]
        for old in list(self.states)[:-CHECKPOINTS]:
            del self.states[old]
        for layer in self.layers:
            layer.restart_recording()
        self._recorded_from = length

    def restorable(self, length: int) -> int:
        """The longest history at most `length` that every layer can return to exactly."""
        if self._can_rewind_to(length):
            return length
        return max((checkpoint for checkpoint in self.states if checkpoint <= length), default=0)

    def _can_rewind_to(self, length: int) -> bool:
        return 0 < length >= self._recorded_from and all(layer.can_rewind for layer in self.layers)

    def restore(self, length: int) -> None:
        """Returns every layer to a length that `restorable` gave; 0 is the empty cache.

        Raises:
            KeyError: there is no checkpoint of that length.
        """
        if self._can_rewind_to(length):
            for layer in self.layers:
                layer.rewind(length - self._recorded_from)
        else:
            self.load(length)
        self.drop_after(length)

    def load(self, length: int) -> None:
        """Copies the states of a checkpoint into the layers, as `restore` does without records.

        Raises:
            KeyError: there is no checkpoint of that length.
        """
        states = self.states[length] if length else [None] * len(self.layers)
        for layer, state in zip(self.layers, states, strict=True):
            layer.restore(state)
        self._recorded_from = length

    def drop_after(self, length: int) -> None:
        """Removes the checkpoints of longer histories."""
        self.states = {at: states for at, states in self.states.items() if at <= length}

    def storages(self) -> dict[int, int]:
        """Address → bytes of every piece of memory that the copies take."""
        return {
            address: size
            for states in self.states.values()
            for state in states
            for address, size in state.storages().items()
        }

    def copy_from(self, other: "StateCheckpoints") -> None:
        """Takes over the checkpoints of a cache whose layers these are forks of."""
        self.states, self._recorded_from = dict(other.states), other._recorded_from

    def clear(self) -> None:
        """Drops every checkpoint."""
        self.states.clear()
        self._recorded_from = 0

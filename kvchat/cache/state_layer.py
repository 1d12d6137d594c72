"""Layers with a state of constant size: recurrent layers and short convolutions.

A recurrent state can't be cropped; it can only be copied and restored. The state of a short convolution is
its last inputs, so a layer that has no other state can be rewound through the inputs it recorded.

Must not depend on token ids, or decide when to copy a state (`state_checkpoints` does).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from transformers.cache_utils import LinearAttentionLayer

from kvchat.cache.dense_layer import DenseLayer
from kvchat.cache.layer import HeadShape, bytes_of

PIECES = 64
"""Recorded tensors before they are concatenated: one per token would make counting memory slow."""


class StateShape(NamedTuple):
    """The states of one layer, measured on a first forward pass."""

    number: int = 1
    """Convolutions in the layer, each with its own state."""
    bytes: int = 0
    """Bytes of all states of the layer; 0 where not known yet."""
    recorded_bytes: int = 0
    """Bytes that one token adds to the record of inputs; 0 for a recurrent layer."""
    by_steps: bool = False
    """Whether the model continues the state exactly by one token at a time only."""


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """A copy of one layer's states, by name: `conv.I [1, channels, kernel]`, `recurrent.I`."""

    tensors: dict[str, torch.Tensor]

    def storages(self) -> dict[int, int]:
        """Address → bytes of the tensors' memory."""
        return bytes_of(self.tensors.values())

    @property
    def storage_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(self.storages().values())


class StateLayer(ABC):
    """The interface of a layer with a state."""

    @abstractmethod
    def state(self) -> RecurrentState:
        """A copy of the current state."""

    @abstractmethod
    def restore(self, state: RecurrentState | None) -> None:
        """Loads a copied state and restarts the record; None is the state before the first token.

        Raises:
            ValueError: the state doesn't fit this layer.
        """

    @property
    @abstractmethod
    def can_rewind(self) -> bool:
        """Whether `rewind` is possible: the layer recorded all inputs since the record was restarted."""

    @abstractmethod
    def rewind(self, tokens: int) -> None:
        """Keeps the first `tokens` tokens of the record.

        Raises:
            ValueError: fewer were recorded.
        """

    @abstractmethod
    def restart_recording(self) -> None:
        """Drops the record of inputs and starts a new one here."""

    @abstractmethod
    def reset(self) -> None:
        """Empties the layer and frees its memory."""

    @abstractmethod
    def fork(self) -> Self:
        """A layer with the same content and its own copy of the state."""

    @abstractmethod
    def state_storages(self) -> dict[int, int]:
        """Address → bytes of the memory of states and record, without keys and values."""

    @abstractmethod
    def state_growth(self, tokens: int) -> int:
        """Bytes that reading so many tokens adds to states and record."""

    @property
    @abstractmethod
    def by_steps(self) -> bool:
        """Whether the model continues the state exactly by one token at a time only."""

    @property
    def state_bytes(self) -> int:
        """Bytes of states and record."""
        return sum(self.state_storages().values())


class RecurrentLayer(LinearAttentionLayer, StateLayer):
    """transformers' layer for recurrent states and short convolutions, with copies and rewinding.

    It records the inputs `[1, channels, tokens]` of the convolution until it gets a recurrent state. Whether
    a layer ever gets one is known after the first forward pass only (`is_croppable`).
    """

    def __init__(self, shape: StateShape = StateShape()) -> None:  # noqa: B008 - a value, and immutable
        LinearAttentionLayer.__init__(self, number_of_states=shape.number)
        self._state_shape = shape
        self._recorded: dict[int, list[torch.Tensor]] = {}
        """Convolution → the window `[1, channels, kernel]` at the start of the record, then its inputs."""
        self.record_past = True

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Takes inputs `[1, channels, new]`; returns the window before them, concatenated with them.

        transformers returns everything recorded, and so convolves it again; only the window is needed.
        """
        if conv_kernel_size is None:  # the model computes the window itself: there are no inputs to record
            self._stop_recording()
        if not self.record_past or conv_kernel_size is None:
            updated: torch.Tensor = super().update_conv_state(
                conv_states, state_idx, conv_kernel_size, **kwargs
            )
            return updated
        begun = self.has_previous_state[state_idx]
        if not begun:
            self._begin(conv_states, state_idx, conv_kernel_size)
        full = torch.cat([self._window(state_idx), conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., -conv_kernel_size:].clone()
        self._record(conv_states.clone(), state_idx)
        return full if begun else conv_states

    def _begin(self, conv_states: torch.Tensor, index: int, kernel: int) -> None:
        """The window before the first token is zeros `[1, channels, kernel]`."""
        window = conv_states.new_zeros((*conv_states.shape[:-1], kernel))
        self._take_conv(index, window)
        self._recorded[index] = [window]

    def _window(self, index: int) -> torch.Tensor:
        window = self.conv_states[index]
        assert window is not None
        return window

    def _take_conv(self, index: int, window: torch.Tensor) -> None:
        self.conv_states[index] = window
        self.conv_kernel_size[index] = window.shape[-1]
        self.is_conv_states_initialized[index] = self.has_previous_state[index] = True
        self.dtype, self.device = window.dtype, window.device  # type: ignore[assignment]

    def _record(self, inputs: torch.Tensor, index: int) -> None:
        pieces = self._recorded[index]
        pieces.append(inputs)
        if len(pieces) > PIECES:
            self._recorded[index] = [torch.cat(pieces, dim=-1)]

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        """Stores the state; from now on the record of inputs can't restore the layer."""
        self._stop_recording()
        state: torch.Tensor = super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        return state

    def _stop_recording(self) -> None:
        self.record_past = False
        self._recorded.clear()

    def state(self) -> RecurrentState:
        states_of = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        return RecurrentState(
            {
                f"{kind}.{index}": tensor.clone()
                for kind, states in states_of.items()
                for index, tensor in states.items()
                if tensor is not None
            }
        )

    def restore(self, state: RecurrentState | None) -> None:
        self._check(state)
        LinearAttentionLayer.__init__(self, number_of_states=self._state_shape.number)
        self._recorded.clear()
        self.record_past = True
        for name, tensor in state.tensors.items() if state else ():
            kind, _, index = name.partition(".")
            if kind == "conv":
                self._take_conv(int(index), tensor.clone())
            else:
                self.recurrent_states[int(index)] = tensor.clone()
                self.is_recurrent_states_initialized[int(index)] = True
                self.record_past = False
        self.restart_recording()

    def _check(self, state: RecurrentState | None) -> None:
        if state is None:
            return
        numbers = range(self._state_shape.number)
        unknown = state.tensors.keys() - {f"{kind}.{i}" for kind in ("conv", "recurrent") for i in numbers}
        size = sum(tensor.nbytes for tensor in state.tensors.values())
        if unknown or size != (self._state_shape.bytes or size):
            names = ", ".join(sorted(state.tensors))
            raise ValueError(f"a state of {names} and {size} bytes does not fit {self._state_shape}")

    @property
    def by_steps(self) -> bool:
        return self._state_shape.by_steps

    @property
    def can_rewind(self) -> bool:
        return self.record_past and self.is_croppable

    def rewind(self, tokens: int) -> None:
        for index, pieces in self._recorded.items():
            inputs = torch.cat(pieces, dim=-1)
            end = self._window(index).shape[-1] + tokens
            if not self.can_rewind or tokens < 0 or end > inputs.shape[-1]:
                raise ValueError(f"{tokens} tokens were not recorded")
            remaining = inputs[..., :end].clone()
            self._recorded[index] = [remaining]
            self.conv_states[index] = remaining[..., tokens:].clone()

    def restart_recording(self) -> None:
        if self.record_past:
            self._recorded = {i: [window] for i, window in self.conv_states.items() if window is not None}

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported.

        Raises:
            RuntimeError: always. transformers would crop the convolution, but not the recurrent state.
        """
        raise RuntimeError("a state can't be cropped; use ConversationKV.truncate")

    def reset(self) -> None:
        self.restore(None)

    def fork(self) -> Self:
        other = type(self)(self._state_shape)
        other._take_state_of(self)
        return other

    def _take_state_of(self, other: "RecurrentLayer") -> None:
        self._state_shape = other._state_shape
        self.restore(other.state())
        self._recorded = {index: pieces[:] for index, pieces in other._recorded.items()}
        self.record_past = other.record_past

    def state_storages(self) -> dict[int, int]:
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        recorded = [piece for pieces in self._recorded.values() for piece in pieces]
        return bytes_of(tensor for tensor in (*states, *recorded) if tensor is not None)

    @property
    def recorded_bytes(self) -> int:
        """Bytes of the recorded inputs."""
        windows = sum(window.nbytes for window in self.conv_states.values() if window is not None)
        pieces = sum(piece.nbytes for pieces in self._recorded.values() for piece in pieces)
        return max(0, pieces - windows)

    def state_growth(self, tokens: int) -> int:
        begun = any(self.is_conv_states_initialized.values())
        return (0 if begun else self._state_shape.bytes) + tokens * self._state_shape.recorded_bytes


class HybridLayer(RecurrentLayer, DenseLayer):  # type: ignore[override] # sets `is_croppable` later
    """Attention and a recurrent state in one layer: keys and values grow, the state does not."""

    is_compileable = False

    def __init__(
        self,
        heads: HeadShape | None = None,
        dtype: torch.dtype | None = None,
        shape: StateShape = StateShape(),  # noqa: B008 - a value, and immutable
    ) -> None:
        DenseLayer.__init__(self, heads, dtype)
        RecurrentLayer.__init__(self, shape)

    def reset(self) -> None:
        DenseLayer.reset(self)
        RecurrentLayer.reset(self)

    def fork(self) -> Self:
        other = DenseLayer.fork(self)
        other._take_state_of(self)
        return other

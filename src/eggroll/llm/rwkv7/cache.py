"""The recurrent state of RWKV-7, in the place of a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerState:
    """What a block carries from one token to the next.

    Attributes:
        wkv: ``(R, heads, N, N)`` float32, values by keys.
        att_shift: ``(R, C)``, the time mix's input of the token before.
        ffn_shift: ``(R, C)``, the channel mix's.
    """

    wkv: Tensor
    att_shift: Tensor
    ffn_shift: Tensor


@dataclass
class RWKV7Cache:
    """One state per block, of fixed size however long the text is; has the methods of a Hugging Face cache."""

    layers: list[LayerState] = field(default_factory=list)
    seen: int = 0

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.seen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (or repeat) rows."""
        for layer in self.layers:
            layer.wkv = layer.wkv.index_select(0, indices)
            layer.att_shift = layer.att_shift.index_select(0, indices)
            layer.ffn_shift = layer.ffn_shift.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        for layer in self.layers:
            layer.wkv = layer.wkv.repeat_interleave(repeats, 0)
            layer.att_shift = layer.att_shift.repeat_interleave(repeats, 0)
            layer.ffn_shift = layer.ffn_shift.repeat_interleave(repeats, 0)

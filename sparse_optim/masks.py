"""The decision which entries of one tensor are trained, as data. Selected means trained.

| mask | what is stored | moments |
| --- | --- | --- |
| `Indexed` | ascending flat indices of the selected entries | compact, one per selected entry |
| `Bits` | one bit per entry | parameter-shaped |
| `Seeded` | nothing: drawn anew from a seed wherever it is needed | parameter-shaped |
| `EVERYTHING`, `NOTHING` | nothing | parameter-shaped, none |
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from torch import Tensor


class Indexed(NamedTuple):
    """A list of entries."""

    indices: Tensor  # [nnz] int32, ascending; int64 when the tensor has more than 2**31 - 1 entries


class Bits(NamedTuple):
    """One bit per entry."""

    bits: Tensor  # uint8, eight entries a byte, lowest bit first, padded to a multiple of four bytes


class Seeded(NamedTuple):
    """Entry e is selected iff the Philox word of (seed, draw, key, e) is below the threshold."""

    seed: int
    draw: int
    threshold: int  # floor(keep * 2**32)
    key: int  # 32 bits that name the tensor, or the layer it belongs to
    one_word: bool  # True: one word, that of entry 0, decides for the whole tensor


class _Constant(Enum):
    EVERYTHING = "everything"
    NOTHING = "nothing"


EVERYTHING, NOTHING = _Constant.EVERYTHING, _Constant.NOTHING
Mask = Indexed | Bits | Seeded | _Constant

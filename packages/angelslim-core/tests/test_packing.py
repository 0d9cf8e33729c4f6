"""Bit packing against a hand-made case and compressed-tensors' own."""

import pytest
import torch

from angelslim_core.exporters.packing import pack, packed_columns, unpack


def test_hand_made_words():
    assert pack(torch.tensor([[-8, -7, 7, 0, 0, 0, 0, -8]], dtype=torch.int8), 4).tolist() == [[0x08888F10]]
    # eleven 3-bit codes: the eleventh straddles two words
    codes = torch.tensor([[-4] * 10 + [3]], dtype=torch.int8)
    assert [w & 0xFFFFFFFF for w in pack(codes, 3)[0].tolist()] == [0b11 << 30, 0b1]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 63, 100])
def test_round_trip_and_peer(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (5, packed_columns(columns, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)

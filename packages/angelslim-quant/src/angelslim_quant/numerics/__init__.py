"""Pure tensor -> tensor arithmetic of number formats. One quantize function serves search, emulation and storage.

Scales are computed in fp32, rounded to the dtype they are stored in, and only then used to quantize. A group of zeros
gets scale 1.
"""

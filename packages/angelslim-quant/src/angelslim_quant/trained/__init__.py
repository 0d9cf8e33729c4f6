"""How linears round while they are trained: one algorithm a file, each a `FakeQuantizer` of the core."""

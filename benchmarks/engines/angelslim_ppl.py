"""Perplexity of a folder whose weights our own reader dequantized, inputs rounded as engines do; run by engines.py.

python angelslim_ppl.py FOLDER TEXT [--characters 2000] [--passages 8] [--plain-inputs]
"""

from __future__ import annotations

from passages import arguments, passages, report
from transformers_ppl import nll

from angelslim_core.loading import load_model


def main() -> None:
    given = arguments()
    loaded = load_model(given.model, "cpu", emulate=not given.plain_inputs, own_reader=True)
    assert loaded.tokenizer
    report([nll(loaded.model, loaded.tokenizer, text) for text in passages(given)])


if __name__ == "__main__":
    main()

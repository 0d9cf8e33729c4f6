"""Perplexity of a GGUF file in llama.cpp, through the C API that the library of the xllamacpp wheel exports; run by engines.py.

python llamacpp_ppl.py FILE TEXT [--characters 2000] [--passages 8]

Structs that C passes by value are opaque here; the few fields that matter lie where xllamacpp 2026.10.11549 has them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_uint32, c_void_p

import numpy as np
import xllamacpp
from passages import arguments, passages, report

CONTEXT = 2048


class Options(ctypes.Structure):
    """Options of a model or a context: larger than either, which by value does no harm as the last argument."""

    _fields_ = [("head", c_uint32 * 4), ("rest", c_int8 * 1008)]  # of a context: n_ctx, n_batch, n_ubatch, ...


class Batch(ctypes.Structure):
    """Tokens of one sequence; where positions and sequences are null, the library counts on from what it holds."""

    _fields_ = [(name, c_int32 if name == "n" else c_void_p) for name in ("n", "tokens", "embeddings", "positions", "sequence_counts", "sequences", "wanted")]


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
quiet = LogCallback(lambda *_: None)  # C holds no reference of its own


# function of the C API, less its prefix -> type of its result, then of its arguments
SIGNATURES = {
    "log_set": (None, LogCallback, c_void_p),
    "backend_init": (None,),
    "model_default_params": (Options,),
    "model_load_from_file": (c_void_p, c_char_p, Options),
    "model_get_vocab": (c_void_p, c_void_p),
    "vocab_n_tokens": (c_int32, c_void_p),
    "tokenize": (c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    "context_default_params": (Options,),
    "init_from_model": (c_void_p, c_void_p, Options),
    "set_n_threads": (None, c_void_p, c_int32, c_int32),
    "get_memory": (c_void_p, c_void_p),
    "memory_clear": (None, c_void_p, c_bool),
    "decode": (c_int32, c_void_p, Batch),
    "get_logits": (POINTER(c_float), c_void_p),
}


class Llama:
    """A model and a context, with the calls this script needs."""

    def __init__(self, file: str, threads: int) -> None:
        library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        for name, (result, *takes) in SIGNATURES.items():
            function = getattr(library, f"llama_{name}")
            function.restype, function.argtypes = result, takes
            setattr(self, f"c_{name}", function)
        self.c_log_set(quiet, None)
        self.c_backend_init()
        model = self.c_model_load_from_file(file.encode(), self.c_model_default_params())
        if not model:
            sys.exit("llama.cpp does not load the file")
        self.vocabulary = self.c_model_get_vocab(model)
        self.size = self.c_vocab_n_tokens(self.vocabulary)
        options = self.c_context_default_params()
        options.head[:3] = [CONTEXT, CONTEXT, 512]
        self.context = self.c_init_from_model(model, options)
        self.c_set_n_threads(self.context, threads, threads)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        data = text.encode()
        room = (c_int32 * len(data))()
        return room[: self.c_tokenize(self.vocabulary, data, len(data), room, len(data), False, False)]

    def nll(self, ids: list[int]) -> list[float]:
        """Negative log-probability of each token but the first."""
        self.c_memory_clear(self.c_get_memory(self.context), True)
        tokens, wanted = (c_int32 * len(ids))(*ids), (c_int8 * len(ids))(*[1] * len(ids))
        batch = Batch(n=len(ids), tokens=ctypes.addressof(tokens), wanted=ctypes.addressof(wanted))
        if self.c_decode(self.context, batch):
            sys.exit("llama.cpp cannot decode the batch")
        logits = np.ctypeslib.as_array(self.c_get_logits(self.context), (len(ids), self.size))[:-1].astype(np.float64)
        peak = logits.max(-1)
        total = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
        return (total - logits[np.arange(len(ids) - 1), ids[1:]]).tolist()


def main() -> None:
    given = arguments()
    llama = Llama(given.model, int(os.environ.get("OMP_NUM_THREADS", "1")))
    report([llama.nll(llama.tokens(text)) for text in passages(given)])


if __name__ == "__main__":
    main()

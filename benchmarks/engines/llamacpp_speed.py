"""Tokens per second of a GGUF file in llama.cpp, as llamacpp_ppl.py reaches it; run by lowbit_cpu.py.

python llamacpp_speed.py FILE [--prompt 64] [--new 32]
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from ctypes import c_int8, c_int32

import numpy as np
from llamacpp_ppl import Batch, Llama
from workload import Prompts, arguments, report


def main() -> None:
    given = arguments()
    llama = Llama(given.model, int(os.environ.get("OMP_NUM_THREADS", "1")))

    def step(ids: list[int]) -> int:
        tokens, wanted = (c_int32 * len(ids))(*ids), (c_int8 * len(ids))(*[0] * (len(ids) - 1), 1)
        if llama.c_decode(llama.context, Batch(n=len(ids), tokens=ctypes.addressof(tokens), wanted=ctypes.addressof(wanted))):
            sys.exit("llama.cpp cannot decode the batch")
        return int(np.ctypeslib.as_array(llama.c_get_logits(llama.context), (llama.size,)).argmax())

    def run(prompts: Prompts, n: int) -> list[float]:
        (ids,) = prompts
        llama.c_memory_clear(llama.c_get_memory(llama.context), True)
        start, stamps = time.perf_counter(), []
        while len(stamps) < n:
            ids = [step(ids)]
            stamps.append(time.perf_counter() - start)
        return stamps

    report(run, given)


if __name__ == "__main__":
    main()

"""Writing a GGUF file tensor by tensor: types are settled from the headers, memory is the tensor at hand."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import gguf_architecture
from ..adapters.base import Description
from ..context import Progress
from ..errors import NumericError, PlanError, PluginError
from ..source import Source
from .blocks import AUTO, BLOCKS, FEW, choose, decode, encode, file_type, holding, lay_out, nbytes, number, ternary
from .model import Shape
from .tokenizer import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("auto", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q2_0", "tq1_0", "tq2_0", "stq1_0")
_PLAIN = {"BF16": "BF16", "F16": "F16"}
_WANTED = {
    "q2_0": "ternary or of the codes -2 to 1 or -1 to 2", "tq1_0": "ternary", "tq2_0": "ternary",
    "stq1_0": "ternary with one zero in every four weights that lie 16 apart",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Args:
        source: its name in the checkpoint.
        name: its name in the file.
        kind: GGUF type.
        as_codes: codes are laid out anew instead of weights rounded.
    """

    source: str
    name: str
    kind: str
    as_codes: bool = False


def write_gguf(source: Source, description: Description, path: Path, kind: str, progress: Progress) -> dict[str, int]:
    """Write a model as one GGUF file, which is complete when this returns.

    Args:
        kind: one of `TYPES`; "auto" keeps codes where a block type holds them and 16-bit dtypes as they are.

    Returns:
        tensors by type, and under "rounded" how many of them are not the very numbers of the source.

    Raises:
        PlanError: the architecture, tokenizer or codes do not fit.
        PluginError: the gguf library is missing.
    """
    try:
        import gguf
    except ImportError:
        raise PluginError(220, "gguf", "writing GGUF needs gguf, which is not installed", "pip install 'angelslim-core[gguf]'") from None
    import numpy as np

    shape = Shape(source.config, gguf_architecture(description.layout, source.config))
    entries = [_entry(source, description, shape, name, kind.upper()) for name in source.dtypes if not name.endswith("rotary_emb.inv_freq")]
    if kind.upper() in FEW and not any(e.kind == kind.upper() for e in entries):
        what = f"no linear of this model is {_WANTED[kind]}, in rows of a multiple of {BLOCKS[kind.upper()].size} and with one F16 scale a block"
        raise PlanError(234, "gguf", what, "train one with a ternary pass, or --type auto")
    vocabulary = read_vocabulary(source.checkpoint.folder, source.config, source.shapes["model.embed_tokens.weight"][0])
    writer = gguf.GGUFWriter(path, shape.architecture)
    _describe(writer, shape, source.checkpoint.folder, vocabulary, _file_type(entries))
    divisors = shape.rope_divisors()
    if divisors:
        writer.add_tensor_info("rope_freqs.weight", (len(divisors),), np.dtype(np.float32), 4 * len(divisors))
    for entry in entries:
        size = source.shapes[entry.source]
        # the library writes the number of a type that it does not know as it is
        writer.add_tensor_info(entry.name, size, np.dtype(np.float32), nbytes(entry.kind, math.prod(size)), number(entry.kind))  # type: ignore[arg-type]
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors:
            writer.write_tensor_data(np.array(divisors, dtype=np.float32))
        counts: dict[str, int] = {"rounded": 0}
        for done, entry in enumerate(entries, 1):
            data, same = _data(source, entry)
            order = shape.row_order(entry.source)
            writer.write_tensor_data(np.ascontiguousarray(data if order is None else data[np.array(order)]))
            counts[entry.kind] = counts.get(entry.kind, 0) + 1
            counts["rounded"] += not same
            progress(done, len(entries), entry.source)
        assert writer.fout is not None
        for stream in writer.fout:
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()
    return counts


def _entry(source: Source, description: Description, shape: Shape, tensor: str, wanted: str) -> Entry:
    """What becomes of a tensor."""
    name, size, module = shape.name(tensor), source.shapes[tensor], tensor.removesuffix(".weight")
    if len(size) != 2:
        return Entry(tensor, name, "F32")
    linear = any(s.name == module and s.layer is not None for s in description.sites)
    scheme = source.quantized.get(module)
    kept = _PLAIN.get(source.dtypes[tensor], "F16")
    if scheme is not None:
        types = holding(scheme.weights, size[1])
        if wanted in _PLAIN:
            return Entry(tensor, name, wanted)
        if wanted in BLOCKS and wanted not in FEW:
            if wanted not in types:
                raise PlanError(235, module, f"is stored as {scheme.name}, whose codes {wanted} does not hold", "--type f16, or convert the original model")
            return Entry(tensor, name, wanted, as_codes=True)
        found = _chosen(source, module, [t for t in dict.fromkeys((wanted, *AUTO)) if t in types])
        return Entry(tensor, name, found or "F16", as_codes=found is not None)
    if wanted in ("F16", "BF16"):
        return Entry(tensor, name, wanted)
    if wanted in FEW:
        weight = ternary(source.read(tensor), BLOCKS[wanted].size) if linear else None
        held = weight is not None and choose(weight, [wanted]) is not None
        return Entry(tensor, name, wanted if held else kept, as_codes=held)
    # beside stored codes nothing else is rounded; the embedding and the head bear less than the layers
    coarse = wanted if linear else "Q8_0"
    return Entry(tensor, name, kept if wanted == "AUTO" or source.quantized or size[1] % BLOCKS[coarse].size else coarse)


def _chosen(source: Source, module: str, kinds: list[str]) -> str | None:
    """Of types that may hold a module's codes, the first that does; weights are read only where a grid leaves it open."""
    if kinds and kinds[0] in FEW:
        last = [kind for kind in kinds if kind not in FEW]  # what is wrong with these is said when they are written
        return choose(source.read_quantized(module), kinds) or (last[0] if last else None)
    return kinds[0] if kinds else None


def _data(source: Source, entry: Entry) -> tuple[Any, bool]:
    """The array of a tensor, and whether it stands for the very numbers of the source.

    Raises:
        NumericError: codes laid out anew do not give the weights they gave before.
    """
    module = entry.source.removesuffix(".weight")
    if entry.as_codes:
        quantized = source.read_quantized(module) if module in source.quantized else ternary(source.read(entry.source), BLOCKS[entry.kind].size)
        assert quantized is not None
        laid_out = lay_out(quantized, entry.kind)
        if laid_out is None:
            raise PlanError(236, module, "has a scale that F16, which GGUF stores, does not hold", "--type f16, or convert the original model")
        data = laid_out.numpy()
        if not decode(data, entry.kind).equal(quantized.dequantize()):
            raise NumericError(220, module, f"would not be the same weights as {entry.kind}")
        return data, True
    exact: Tensor = source.read_quantized(module).dequantize() if module in source.quantized else source.read(entry.source).float()
    data = encode(exact, entry.kind)
    return data, decode(data, entry.kind).reshape(exact.shape).equal(exact)


def _file_type(entries: list[Entry]) -> int:
    """What llama.cpp calls the type that most matrices have."""
    kinds = [e.kind for e in entries if e.kind != "F32"]
    return file_type(max(dict.fromkeys(kinds), key=kinds.count))


def _describe(writer: Any, shape: Shape, folder: Path, vocabulary: Vocabulary, file_number: int) -> None:
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(file_number)
    writer.add_quantization_version(2)
    _add_fields(writer, shape.architecture, shape.fields())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitter)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for short, index in vocabulary.specials.items():
        getattr(writer, f"add_{short}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_space_prefix(False)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)


def _add_fields(writer: Any, architecture: str, fields: Mapping[str, int | float | str]) -> None:
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)

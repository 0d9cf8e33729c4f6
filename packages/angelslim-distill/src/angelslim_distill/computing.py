"""How a step is computed: layer by layer as transformers does, or compiled, and documents by attention of variable length. Sums differ in rounding only.

The faster way is tried on the first batch, beside the plain one: hidden states and gradients must be the same but for rounding.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from angelslim_core import fake_quant
from angelslim_core.errors import EngineError
from angelslim_core.fake_quant import FakeQuantizedLinear, FakeQuantizer
from angelslim_core.model import decoder_layers

from .attention import register, varlen_obstacle
from .heads import Reader
from .targets import Batch, Hidden, Teacher, TopK
from .teacher import ModelTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from angelslim_core.parallel import Group

# relative distances of hidden states and of gradients beyond which it is not rounding: SmolLM2-135M at 2 bits in BF16 is .05 and .24 from itself in
# fp32, compiled .04 and .16, and these two are .06 and .34 apart (in fp32 4e-6 and 1e-5); what is nothing alike is 1.4 off
STATES, GRADIENTS = 0.25, 0.8
# graphs that layers may become
MOST_GRAPHS = 8


@dataclass(frozen=True)
class Ways:
    """What may be done to be faster.

    Args:
        compile: compile decoder layers (torch.compile); rows must then be of one length. "auto": on a GPU, if it can be done.
        attention: of documents, by their own length or under a mask; "auto": "varlen" where it can be done.
        backend: of torch.compile.
    """

    compile: bool | Literal["auto"] = False
    attention: Literal["auto", "masked", "varlen"] = "masked"
    backend: str = "inductor"


class Way(NamedTuple):
    """
    Args:
        compiled: decoder layers are.
        varlen: attention of documents is of variable length.
    """

    compiled: bool
    varlen: bool

    def __str__(self) -> str:
        return " and ".join(name for name, is_on in zip(("compiled layers", "attention of variable length"), self, strict=True) if is_on) or "plain"


PLAIN = Way(False, False)


class Computing:
    """Teacher and student on a batch, in a way that `settle` chooses.

    Args:
        linears: those of the student that are rounded before its layers run.
        obstacle: why nothing but the plain way can be gone; empty: nothing is known against others.
        tell: told, a line each, what was to be tried and cannot be done.

    Attributes:
        graphs: that were compiled.
        seconds: that `settle` took.
    """

    def __init__(
        self, reader: Reader, teacher: Teacher | None, linears: Collection[FakeQuantizedLinear], ways: Ways, *, obstacle: str = "",
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self._reader, self._teacher, self._linears, self._ways, self._tell = reader, teacher, linears, ways, tell
        self._obstacle = obstacle
        self._readers = [reader, *([teacher.reader] if isinstance(teacher, ModelTeacher) else [])]
        self._layers: list[nn.Module] = []
        self._forward: Callable[..., Any] | None = None
        self._inner: Callable[..., Any] | None = None
        self.way, self.graphs, self.seconds = PLAIN, 0, 0.0

    def __call__(self, batch: Batch) -> tuple[Hidden, Hidden | TopK | None]:
        """The student's hidden states, and the distributions of the teacher if there is one.

        Raises:
            EngineError: layers became too many graphs.
        """
        with self._in(self.way):
            target = self._teacher(batch) if self._teacher is not None else None
            with fake_quant.held(self._linears):
                return self._reader(batch), target

    def settle(self, first: Callable[[], Batch], group: Group) -> None:
        """Choose the fastest way that works on a batch, of those that are allowed.

        Args:
            first: a batch on the device, as those that follow will be; asked for if there is something to choose.

        Raises:
            EngineError: what was asked for by name does not work.
        """
        candidates = self._candidates()
        if candidates == [PLAIN]:
            return
        began, batch = time.perf_counter(), first()
        wanted = self._tried(PLAIN, batch)
        for way in candidates:
            if way == PLAIN:
                break
            why = ""
            try:
                why = _difference(self._tried(way, batch), wanted)
            except Exception as error:  # compilers raise all sorts; too little memory among them: two ways' gradients are held at once
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            failed = bool(group.reduce(torch.tensor(float(bool(why))), "max"))
            if not failed:
                self.way, self.seconds = way, time.perf_counter() - began
                return
            why = why or "another process cannot"
            if way == candidates[-1]:
                raise EngineError(1010, str(way), f"on the first batch: {why}", "give compile: false, or attention: masked")
            self._tell(f"{way}: not done, since on the first batch: {why}")
        self.seconds = time.perf_counter() - began

    def _candidates(self) -> list[Way]:
        """Fastest first.

        Raises:
            EngineError: what is asked for by name cannot be done.
        """
        ways, on_gpu = self._ways, self._reader.model.device.type == "cuda"
        no_varlen = next(filter(None, (self._obstacle, *(varlen_obstacle(r.model) for r in self._readers))), "")
        no_compile = next(filter(None, (self._obstacle, *map(_held_obstacle, self._linears))), "")
        if ways.attention == "varlen" and no_varlen:
            raise EngineError(1011, "attention", f"varlen: {no_varlen}", "give attention: auto")
        if ways.compile is True and no_compile:
            raise EngineError(1012, "compile", no_compile, "give compile: false")
        compiled = {True: [True], False: [False], "auto": [True, False] if on_gpu and not no_compile else [False]}[ways.compile]
        varlen = {"varlen": [True], "masked": [False], "auto": [False] if no_varlen else [True, False]}[ways.attention]
        return [Way(c, v) for c in compiled for v in varlen]

    def _tried(self, way: Way, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states of teacher and student at all tokens, and gradients of something of the student's, in that way."""
        before, self.way = self.way, way
        parameters = [p for p in self._reader.model.parameters() if p.requires_grad]
        try:
            student, target = self(batch)
        finally:
            self.way = before
        some = batch.attention_mask[..., None]
        torch.manual_seed(0)
        slope = torch.randn_like(student.states) * some
        gradients = torch.autograd.grad(student.states, parameters, slope, allow_unused=True, materialize_grads=True)
        theirs = [(target.states * some).detach()] if isinstance(target, Hidden) else []
        return [*theirs, (student.states * some).detach()], list(gradients)

    @contextmanager
    def _in(self, way: Way) -> Iterator[None]:
        """Inside, models compute in a way."""
        if way.varlen:
            register()
        try:
            for reader in self._readers:
                reader.is_varlen = way.varlen
            if not way.compiled:
                yield
                return
            forward = self._compiled()
            self._layers = self._layers or list(dict.fromkeys(layer for r in self._readers for layer in layers_of(r.model)))
            for layer in self._layers:
                layer.__dict__["forward"] = types.MethodType(forward, layer)
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=MOST_GRAPHS):
                yield
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            what = f"layers became more than {MOST_GRAPHS} graphs, which rows of many lengths do"
            raise EngineError(1013, "compile", what, "give compile: false") from error
        finally:
            for reader in self._readers:
                reader.is_varlen = False
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def _compiled(self) -> Callable[..., Any]:
        if self._forward is None:
            # what is compiled is kept by code object: one of its own goes with this training
            own = types.FunctionType(_layer.__code__.replace(), _layer.__globals__, _layer.__name__)
            compiled = torch.compile(own, fullgraph=True, dynamic=False, backend=self._backend)

            def forward(layer: nn.Module, states: Tensor, *args: Any, **given: Any) -> Any:
                # the first layer's input is asked nothing; that it be asked as the others' are spares a graph of its own
                if torch.is_grad_enabled() and not states.requires_grad:
                    states = states.detach().requires_grad_()
                return compiled(layer, states, *args, **given)

            self._forward = forward
        return self._forward

    def _backend(self, graph: Any, inputs: list[Any]) -> Any:
        self.graphs += 1
        self._inner = self._inner or torch._dynamo.lookup_backend(self._ways.backend)
        return self._inner(graph, inputs)


def _layer(layer: nn.Module, *args: Any, **given: Any) -> Any:
    return type(layer).forward(layer, *args, **given)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """A model's decoder layers."""
    return decoder_layers(model, model.config.get_text_config().num_hidden_layers)[1]


def _held_obstacle(linear: FakeQuantizedLinear) -> str:
    """Why a linear cannot be rounded before its layer, compiled, runs."""
    quantizer = linear.quantizer
    if not fake_quant.can_hold(linear):
        return f"{type(quantizer).__name__} makes its product itself"
    if type(quantizer).inputs is not FakeQuantizer.inputs and quantizer.scheme.input_activations is not None:
        return f"{type(quantizer).__name__} rounds inputs"
    return ""


def _difference(found: tuple[list[Tensor], list[Tensor]], wanted: tuple[list[Tensor], list[Tensor]]) -> str:
    """What is not the same but for rounding; empty: nothing."""
    for name, limit, ones, others in zip(("hidden states", "gradients"), (STATES, GRADIENTS), found, wanted, strict=True):
        apart, size = torch.zeros(2, dtype=torch.float64, device=others[0].device)
        for one, other in zip(ones, others, strict=True):
            apart = apart + (one.float() - other.float()).square().sum().double()
            size = size + other.float().square().sum().double()
        distance = float((apart / size.clamp(min=1e-60)).sqrt())
        if not distance <= limit:
            return f"{name} are {distance:.2g} off, in parts of them"
    return ""

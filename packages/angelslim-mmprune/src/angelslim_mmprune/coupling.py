"""Models that drop media tokens: `attach` hooks a transformers model; none of its code is replaced.

A prompt's tokens are dropped before the first layer of the language model (stage B) or behind one of its layers (stage C). Positions stay what
they were; a later pass over the same cache goes on behind the last of them. Shapes: B rows, L tokens of a pass, W of those that are left,
P pools, N tokens of the largest, D width of the language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from angelslim_core.errors import UsageError

from .capture import EncoderCall, EncoderCapture, LanguageCapture
from .layout import Pools, applied, items_of, present, text_of, whole_plan
from .models import at, towers
from .plan import Plan, Pool
from .running import Running
from .sequence import State, Tokens, cache_in, columns_of, cut, gathered, positions_of, state_of
from .steps import Applied, AppliedPool, Step, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .plan import Need
    from .strategies.base import Strategy


class Coupling:
    """A model that prunes, until `remove` or the end of a `with` block.

    Attributes:
        last: what each stage did to the last prompt that had media. The logits of its pass are those of the tokens that were left; rows that
            kept fewer than others are padded on the left.
    """

    def __init__(self, model: PreTrainedModel, strategies: Sequence[Strategy]) -> None:
        self._towers = towers(model)
        self._steps = steps_of(self._towers, strategies)
        # the first layers of groups that see the same tokens
        self._firsts = tuple(sorted({0} | {step.layer + 1 for step in self._steps}))
        self.last: list[Applied] = []
        self._pass: Running | None = None
        # what the encoder made and a prompt has not come with yet: generation runs it before the model
        self._calls: list[EncoderCall] = []
        self._encoding: tuple[ExitStack, EncoderCapture] | None = None
        self._needs = [need for step in self._steps if step.drops for need in step.strategy.needs if need.source == "encoder"]
        root, language, encoder = self._towers.root, self._towers.language, self._towers.encoder
        self._handles = [
            encoder.register_forward_pre_hook(self._encode, with_kwargs=True),
            encoder.register_forward_hook(self._encoded, always_call=True),
            root.register_forward_pre_hook(self._enter, with_kwargs=True),
            root.register_forward_hook(lambda *_: self._end(), always_call=True),
            language.register_forward_pre_hook(self._begin, with_kwargs=True),
            language.register_forward_hook(self._finish, always_call=True),
        ]
        self._handles += [layer.register_forward_pre_hook(self._layer_hook(i), with_kwargs=True) for i, layer in enumerate(self._towers.layers)]

    def __enter__(self) -> Coupling:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """The model computes as before; caches of pruned prompts are of no more use."""
        self._end()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # the whole model: media and text

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        self._end()
        inputs, now = _bound(module, args, kwargs), Running()
        cache = cache_in(inputs)
        if (state := self._state(cache)) is not None:
            cut(inputs, state)
        if kinds := present(self._towers, inputs):
            if state is not None and self._towers.media.merge and inputs.get("position_ids") is None:
                raise UsageError(826, "position_ids", f"are needed where a new {kinds[0].name} comes after a pruned prompt", "pass those of the whole prompt")
            encoded = inputs.get("mm_encoder_outputs") or {}
            calls = {kind.name: call for kind in kinds for call in self._calls if call.made_it(encoded.get(kind.name))}
            now.calls, now.told = list(calls.values()), inputs.get(kinds[0].told)
            now.items = items_of(self._towers, inputs, calls)
            self._prepare(now)
        elif inputs.get("input_ids") is not None and (cache is None or cache.get_seq_length() == 0):
            for kind in self._towers.media.kinds:
                if bool((inputs["input_ids"] == at(self._towers.config, kind.placeholder)).any()):
                    raise UsageError(818, kind.inputs, f"the prompt has placeholders of {kind.name} tokens, and the pass no {kind.name}")
        self._pass = now
        return (), inputs

    def _prepare(self, now: Running) -> None:
        """Pools of a prompt, and taps of the language model."""
        self.last = []
        device = next(self._towers.language.parameters()).device
        needs: list[Need] = []
        for step in self._steps:
            scope, modalities = step.pools
            if step.pools not in now.pools:
                if not any(item.kind.modality in modalities for item in now.items):
                    raise UsageError(819, step.strategy.name, f"the prompt has no tokens of {' or '.join(sorted(modalities))}")
                now.pools[step.pools] = Pools.of(now.items, scope, modalities, device)
            pools = now.pools[step.pools]
            if any(k < n for k, n in zip(pools.budget(step.strategy, step.stage.share), pools.counts, strict=True)):
                now.prunes = True
                needs += [need for need in step.strategy.needs if need.source == "llm" and need not in needs]
        if needs:
            now.language = LanguageCapture(now.stack, self._towers, needs, now.rows)

    def _state(self, cache: Any) -> State | None:
        return None if cache is None or cache.get_seq_length() == 0 else state_of(cache)

    # the encoder

    def _encode(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        media, now = self._towers.media, self._pass
        self._calls = [call for call in self._calls if call.made is not None and call.made() is not None]
        told = _bound(module, args, kwargs)[media.told] if media.told else None if now is None else now.told
        if told is None:
            return
        sizes = media.kinds[0].sizes(self._towers.config, module, told)
        stack = ExitStack()
        self._encoding = stack, EncoderCapture(stack, self._towers, self._needs, sizes)

    def _encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        encoding, self._encoding = self._encoding, None
        if encoding is None:
            return
        encoding[0].close()
        if output is not None:
            call = encoding[1].finish()
            if self._pass is not None:
                self._pass.calls.append(call)
            else:
                call.made = ref(output.last_hidden_state)
                self._calls.append(call)

    # the language model

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        now = self._pass = self._pass or Running()
        inputs = _bound(module, args, kwargs)
        cache = cache_in(inputs)
        state = self._state(cache)
        if state is None and not now.items:
            return None
        language: Any = module
        x = language.get_input_embeddings()(inputs["input_ids"]) if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        batch, length = x.shape[:2]
        real = columns_of(inputs.get("attention_mask"), length, batch, x.device)
        now.tokens = Tokens.of(real)
        if not now.prunes and now.items:
            for step in self._steps:
                pools = now.pools[step.pools]
                self._record(step, now.tokens, now.tokens.lengths, pools, whole_plan(None, (), pools, pools.counts), pools.counts)
        if state is None and not now.prunes:
            return None
        if len(self._firsts) > 1 and language.training and getattr(language, "gradient_checkpointing", False):
            raise UsageError(
                827, "gradient_checkpointing", "layers that run twice cannot drop tokens between them", "train with a stage before the first layer"
            )
        now.fresh = state is None
        past = 0 if cache is None else cache.get_seq_length()
        if state is None:
            state = State.fresh(len(self._firsts), past, inputs.get("attention_mask"), batch, length, x.device)
        else:
            state.check(cache, self._firsts, batch)
        now.state = state
        given = inputs.get("position_ids")
        # what generation counts is right for a prompt, and for new media after another
        positions = positions_of(given if now.fresh or now.items else None, state, real, now.fresh)
        furthest = (positions if positions.ndim == 2 else positions.amax(0)).masked_fill(~real, -1).amax(1) + 1
        now.next = furthest if now.fresh else torch.maximum(state.next, furthest)
        if now.prunes:
            if any(need not in call.values for call in now.calls for need in self._needs) or (self._needs and not now.calls):
                raise UsageError(829, "mm_encoder_outputs", "the encoder ran before the model was attached to", "let it run again")
            if any(step.strategy.reads_text or step.strategy.text_needs for step in self._steps):
                now.text = text_of(now.items, real)
            now.encoded = {need: torch.cat([call.values[need] for call in now.calls]) for need in self._needs}
            visual, features = inputs.get("visual_pos_masks"), inputs.get("deepstack_visual_embeds") or ()
            states = [x, *(torch.zeros_like(x).masked_scatter(visual[..., None], part.to(x)) for part in features)]  # type: ignore[index]
            states, order = self._shorten(now, states, -1)
            if order is not None:
                x = states[0]
                positions = positions.gather(-1, order.expand(*positions.shape[:-1], -1))
                if visual is not None:
                    visual = inputs["visual_pos_masks"] = visual.gather(1, order) & now.tokens.real
                    inputs["deepstack_visual_embeds"] = [part[visual] for part in states[1:]]
        now.extend()
        # without a cache and a mask transformers takes jumps in positions for the bounds of packed sequences
        mask = now.masks[0] if now.padded[0] or cache is None else None
        return (), inputs | {"input_ids": None, "inputs_embeds": x, "position_ids": positions, "attention_mask": mask}

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        now = self._pass
        if output is not None and now is not None and now.state is not None and now.cache is not None:
            assert now.tokens is not None and now.next is not None
            State(now.state.seen + now.tokens.width, now.next, tuple(now.masks), tuple(now.padded)).write(now.cache)
        self._end()

    def _end(self) -> None:
        now, self._pass = self._pass, None
        if now is not None:
            now.stack.close()

    # its layers

    def _layer_hook(self, number: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            now = self._pass
            if now is None or now.state is None:
                return None
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if number == 0:
                now.cache, now.rotations = cache_in(kwargs), kwargs["position_embeddings"]
            elif number in self._firsts:
                now.group += 1
                if now.prunes:
                    (hidden,), order = self._shorten(now, [hidden], number - 1)
                    if order is not None:
                        now.rotations = tuple(gathered(part, order) for part in now.rotations)
                now.extend()
                now.causal = self._causal(now, hidden, number)
            if now.group:
                kwargs |= {"attention_mask": now.causal, "position_embeddings": now.rotations}
            # where no token is padding, flash attention would take jumps in positions for the bounds of packed sequences
            return (hidden, *args[1:]), kwargs | {"position_ids": None}

        return before

    def _causal(self, now: Running, hidden: Tensor, layer: int) -> Any:
        """The mask of a group of layers, as their attention takes it."""
        from transformers.masking_utils import create_causal_mask

        name = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
        mask = now.masks[now.group] if now.padded[now.group] or now.cache is None else None
        config: Any = self._towers.language.config
        return create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=mask, layer_idx=layer, **{name: now.cache})

    # pruning

    def _shorten(self, now: Running, states: list[Tensor], layer: int) -> tuple[list[Tensor], Tensor | None]:
        """Apply the stages behind a layer.

        Args:
            states: [B, W, D]: hidden states, and what else goes with them.

        Returns:
            the states of what is left, and where that was, [B, most]; None: all of it is where it was.
        """
        tokens = now.tokens
        assert tokens is not None
        whole: Tensor | None = None

        def shorten(alive: Tensor, lengths: list[int]) -> None:
            nonlocal states, whole
            order = tokens.shorten(alive, lengths)
            states = [gathered(state, order) for state in states]
            whole = order if whole is None else whole.gather(1, order)
            if now.language is not None:
                now.language.found = {need: gathered(values, order) for need, values in now.language.found.items()}

        if layer < 0 and tokens.padded:
            shorten(tokens.real, tokens.lengths)
        for step in self._steps:
            if step.layer != layer:
                continue
            pools, had = now.pools[step.pools], list(tokens.lengths)
            keep = [min(k, n) for k, n in zip(pools.budget(step.strategy, step.stage.share), pools.counts, strict=True)]
            slots = tokens.slots(pools.row_of, pools.columns)
            plan = self._plan(now, step, pools, keep, states[0], slots)
            states, alive = applied(plan, pools, keep, slots, tokens.real, states)
            lengths = list(had)
            for row, k, n in zip(pools.rows, keep, pools.counts, strict=True):
                lengths[row] -= n - k
            if lengths != had:
                shorten(alive, lengths)
            self._record(step, tokens, had, pools, plan, keep)
            now.pools[step.pools] = pools.after(plan, keep)
            if len(now.pools) > 1 and lengths != had:
                left = torch.zeros(len(alive), tokens.width, dtype=torch.bool, device=alive.device).scatter_(1, tokens.numbers, tokens.real)
                now.pools = {key: of if key == step.pools else of.without(left) for key, of in now.pools.items()}
        return states, whole

    def _plan(self, now: Running, step: Step, pools: Pools, keep: Sequence[int], x: Tensor, slots: Tensor) -> Plan:
        """[P, K]; a strategy sees only pools of which some tokens stay and some go."""
        numbers = [i for i, (k, n) in enumerate(zip(keep, pools.counts, strict=True)) if 0 < k < n]
        if not numbers:
            return whole_plan(None, (), pools, keep)
        assert now.tokens is not None
        strategy, width = step.strategy, max(pools.counts[i] for i in numbers)
        language = now.language.found if now.language is not None else {}
        statistics = {need: now.encoded[need][pools.index] for need in strategy.needs if need in now.encoded}
        statistics |= {need: language[need][pools.row_of, slots] for need in strategy.needs if need in language}
        text: dict[str, Any] = {}
        if strategy.reads_text or strategy.text_needs:
            columns = [now.text[pools.rows[i]] for i in numbers]
            rows = pools.row_of[numbers]
            places = now.tokens.slots(rows, nn.utils.rnn.pad_sequence(columns, batch_first=True).to(x.device))
            text = {
                "text": x[rows, places] if strategy.reads_text else None, "text_counts": tuple(map(len, columns)),
                "text_statistics": {need: language[need][rows, places] for need in strategy.text_needs if need in language},
                "text_before": tuple(int((of < pools.lasts[i]).sum()) for i, of in zip(numbers, columns, strict=True)),
            }  # fmt: skip
        pool = Pool(
            pools.cut(x[pools.row_of, slots], numbers, width), tuple(pools.counts[i] for i in numbers), pools.cut(pools.segments, numbers, width),
            tuple(pools.grids[i] for i in numbers), {need: pools.cut(values, numbers, width) for need, values in statistics.items()}, **text,
        )  # fmt: skip
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            part = strategy.plan(pool, [keep[i] for i in numbers])
        return whole_plan(part, numbers, pools, keep)

    def _record(self, step: Step, tokens: Tokens, had: Sequence[int], pools: Pools, plan: Plan, keep: Sequence[int]) -> None:
        records = tuple(
            AppliedPool(row, modality, grids, pools.columns[i, :n], plan.keep[i, :k], None if plan.groups is None else plan.groups[i, :n])
            for i, (row, modality, grids, n, k) in enumerate(zip(pools.rows, pools.modalities, pools.grids, pools.counts, keep, strict=True))
        )
        self.last.append(Applied(step.strategy.name, step.stage, tuple(had), tuple(tokens.lengths), tokens.numbers, tokens.real, records))


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass by name."""
    return dict(zip(list(inspect.signature(type(module).forward).parameters)[1:], args, strict=False)) | kwargs


def attach(model: PreTrainedModel, strategies: Strategy | Sequence[Strategy]) -> Coupling:
    """From now on a model drops media tokens of its prompts, by one strategy or by several, in the order of their stages.

    Raises:
        ModelError: an unknown architecture.
        PlanError: the model cannot do what a strategy asks for.
        UsageError: a layer that there is not, or a model that drops tokens already.
    """
    from .installed import attachment

    if attachment(model) is not None:
        raise UsageError(851, "model", "drops media tokens already", "remove what `attachment` finds first, or give all strategies at once")
    return Coupling(model, strategies if isinstance(strategies, Sequence) else [strategies])


attached = attach  # a coupling ends with its `with` block

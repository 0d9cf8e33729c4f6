"""A conversation with a model folder, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    from .plugins import PluginHost


class Conversation:
    """Keeps the turns of one conversation.

    Args:
        path: model folder.
        device: "auto", "cpu" or "cuda".
        host: holds third parties' plugins that know the folder.
    """

    def __init__(self, path: str | Path, device: str = "auto", *, host: PluginHost | None = None) -> None:
        from .calibration.render import template_of
        from .io.hub import resolve
        from .loading import load_model

        loaded = load_model(resolve(path), device, host=host)
        if loaded.tokenizer is None:
            raise ModelError(94, str(path), "has no tokenizer, so it cannot chat")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.template = template_of(self.tokenizer)
        self.turns: list[dict[str, str]] = []

    def answer(self, prompt: str, max_new_tokens: int = 256, temperature: float = 0.0) -> Iterator[str]:
        """Pieces of the model's answer to one more user turn."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "streamer": streamer}
        options.update({"temperature": temperature} if temperature > 0 else {"temperature": None, "top_p": None, "top_k": None})
        failure: list[BaseException] = []
        encoded = self.ask(prompt)

        def work() -> None:
            try:
                self.model.generate(**encoded, **options)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        said = ""
        for piece in streamer:
            said += piece
            yield piece
        thread.join()
        if failure:
            raise failure[0]
        self.turns.append({"role": "assistant", "content": said})

    def ask(self, prompt: str) -> Any:
        """One more user turn; what the tokenizer makes of the conversation so far: `input_ids`, `attention_mask`, [1, P]."""
        from .calibration.render import render_chats

        self.turns.append({"role": "user", "content": prompt})
        if not self.template:
            return self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        special = {k: v for k, v in self.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        (text,) = render_chats(self.template, [self.turns], special, add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self.model.device)

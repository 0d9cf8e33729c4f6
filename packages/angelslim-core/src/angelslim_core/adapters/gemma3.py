"""Gemma 3, text only and multimodal (its vision tower and projector are left alone)."""

from .base import ATTENTION, ATTENTION_FEED, INNER_FEEDS, MLP, READS_MLP, VALUE_FEED, Feed, Layout

LAYOUTS = (
    Layout(
        model_types=("gemma3_text", "gemma3"),
        roles=ATTENTION | MLP,
        # the norms named post_* follow attention and feed-forward part, and scale what is added to the stream
        feeds=(ATTENTION_FEED, VALUE_FEED, Feed("pre_feedforward_layernorm", READS_MLP, "mlp"), *INNER_FEEDS),
        norm_offset=1.0,
        renamed={"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"},
    ),
)

"""Prompts, conversations, and what a draft is trained on."""

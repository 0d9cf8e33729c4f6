"""Which proposed tokens stay, and what comes after them: pure functions of tensors."""

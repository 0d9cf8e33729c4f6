"""The plugin of distillation. It registers nothing yet, and naming it where it would have to do something is an error."""

ANGELSLIM_HOOKS = 1

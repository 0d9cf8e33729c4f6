"""The plugin of sparse attention. It registers nothing yet, and naming it where it would have to do something is an error."""

ANGELSLIM_HOOKS = 1

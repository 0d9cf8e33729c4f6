"""For tests of plugins, ours and third parties': tiny models of every architecture, and a conformance kit for passes.

`models.tiny_checkpoint` makes a randomly initialised model folder in a second; `conformance.check_pass` runs a pass
through what the pipeline will ask of it.
"""

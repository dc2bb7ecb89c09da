"""What a training or a generation needs, by arithmetic: memory, time, price. Plain Python, no torch.

`job` reads a configuration, `parameters`, `activations` and `memory` give bytes of each pipeline stage, `speed` and
`inference` times, `tokens` the lengths of a data set, `search` tries layouts, `estimate` and `table` put it together.
"""

"""The graph of a model: captured by torch.export, with the channels that lie along every value of it.

`inputs` are examples, `copies` makes the copy that is captured, `capture` gets the graph, `channels` and `values` are
what is known of it, `nodes` read what a node says of itself, `rules` say what each operator does to channels,
`reader` asks them for every operation (`overwriting` sees to those in place), `analysis` finds what can leave, `ties`
tells which noise layers decide together, `suggestions` where noise would remove something. `operators` and
`stock_layers` name families of operators and of torch's layers, for pruning, compaction and files too.
"""

"""The graph of a model: captured by torch.export, with the channels that lie along every value of it.

`capture` gets the graph, `rules` say what each operator does to channels, `analysis` asks them and finds what can
leave, `ties` tells which noise layers decide together.
"""

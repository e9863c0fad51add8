"""Pretrained networks made smaller from start to end: run ``python -m bmrs.examples.minilm``, for one."""

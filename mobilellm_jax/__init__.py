"""Architecture ablations of sub-billion-parameter language models (MobileLLM, arXiv 2402.14905) in JAX.

Read in this order: `sharing.py` (the idea), `model/stack.py` and `model/block.py` (the network and the loss),
`training/step.py` (one step), `training/loop.py` (the loop).
"""

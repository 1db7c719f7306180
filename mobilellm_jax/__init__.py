"""Architecture ablations of sub-billion-parameter language models (MobileLLM, arXiv 2402.14905) in JAX.

Read in this order: `sharing.py` (the idea), `model.py` (the network and the loss), `train.py` (the loop).
"""

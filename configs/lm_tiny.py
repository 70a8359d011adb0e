"""Byte-level Llama, 107k parameters without embeddings, on the Python standard library's own source.

    lowprec train --config=configs/lm_tiny.py --config.recipe=nvfp4

2 CPU cores, two runs at a time: 0:46 (bf16) to 2:20 (quartet2). Held-out bits/byte, seed 0: bf16 2.268, fp8 2.305,
quartet2 2.302, nvfp4 2.376 (`make demo` trains all four).
"""

from lowprec.training.config import default


def get_config():
    config = default()
    config.data.name = "stdlib_text"
    config.data.seq_len = 128
    config.model.layers = 2
    config.model.width = 64
    config.model.heads = 2
    config.train.steps = 800
    config.train.batch_size = 16
    config.optimizer.lr = 4e-3
    config.eval.every = 200
    config.eval.batches = 50
    config.checkpoint.every = 200
    return config

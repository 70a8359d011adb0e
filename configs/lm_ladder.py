"""The sizes at which scaling laws are measured: S0 … S5 on bytes, 30M … 3200M as in QuEST and Quartet.

lowprec train --config=configs/lm_ladder.py:S2 --config.recipe=nvfp4
lowprec train --config=configs/lm_ladder.py:30M --config.data.name=c4/en --config.recipe=quartet2

2 CPU cores, busy with other work: S1 in 2:00 (bf16) and 3:07 (nvfp4). Held-out bits/byte, seed 0: S0 bf16 3.221,
nvfp4 3.245; S1 bf16 2.189, nvfp4 2.271. The sizes from S2 on and those on C4 were not run here.
"""

from lowprec.models import ladder
from lowprec.training.config import default

BYTE_LEVEL = ("S0", "S1", "S2", "S3", "S4", "S5")


def get_config(size="S1"):
    rung = ladder.get(size)
    config = default()
    for name in ("layers", "width", "heads"):
        config.model[name] = getattr(rung.model, name)
    config.optimizer.lr = rung.lr
    if size in BYTE_LEVEL:
        config.data.name, config.data.tokenizer, config.data.seq_len = "stdlib_text", "byte", 128
        config.train.batch_size = 16
    else:
        config.data.name, config.data.tokenizer, config.data.seq_len = "c4/en", "bpe32000", 512
        config.train.batch_size = 512
        config.model.dtype = "bfloat16"
    config.train.steps = -(-rung.tokens // (config.train.batch_size * config.data.seq_len))
    config.eval.every = config.checkpoint.every = max(config.train.steps // 20, 1)
    config.eval.batches = 50 if size in BYTE_LEVEL else 20
    return config

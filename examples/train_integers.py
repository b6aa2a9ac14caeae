"""Training on integers of a numpy array, a row a document. Run again, it goes on where it stopped.

python examples/train_integers.py
"""

from __future__ import annotations

import numpy as np

from rwkv_cluster import IntegerTokenizer, ModelConfig, RWKVTrainingPipeline, TrainingConfig


def main(work_dir: str = "work/angles", steps: int = 200) -> float | None:
    """Train on angles that turn at different speeds, and return the last loss."""
    start, speed = np.arange(200)[:, None] * 7, np.arange(200)[:, None] % 11 + 1
    angles = (start + speed * np.arange(256)) % 360
    pipeline = RWKVTrainingPipeline(
        work_dir,
        model_config=ModelConfig(model_type="x070", n_layer=2, n_embd=64, ctx_len=64),
        training_config=TrainingConfig(precision="fp32", micro_bsz=8, lr_init=2e-3, max_steps=steps),
        tokenizer=IntegerTokenizer(max_value=359),
    )
    return pipeline.train(angles).loss


if __name__ == "__main__":
    print("loss", main())

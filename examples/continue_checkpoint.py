"""Training weights of any layout further on text, in a run of its own.

python examples/continue_checkpoint.py rwkv7-0.1b.pth text.jsonl world
"""

from __future__ import annotations

import sys

from rwkv_cluster import ModelConfig, RWKVTrainingPipeline, TrainingConfig


def main(weights: str, text: str, tokenizer: str, work_dir: str = "work/continued", steps: int = 100) -> str:
    """Train on the JSONL file `text`, and return the path of the new weights. tokenizer: world, or byte."""
    pipeline = RWKVTrainingPipeline(
        work_dir,
        model_config=ModelConfig(ctx_len=512),  # all other sizes are read from the weights
        training_config=TrainingConfig(micro_bsz=1, lr_init=3e-5, lr_final=3e-6, max_steps=steps),
        tokenizer=tokenizer,
    )
    pipeline.prepare_data_from_jsonl(text)
    return str(pipeline.train_from_checkpoint(weights).final_path)


if __name__ == "__main__":
    print(main(*sys.argv[1:4]))

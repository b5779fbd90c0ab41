"""Train the small default model from scratch: it finds pass keys, key-value pairs and marked lines in long contexts.

python scripts/train_default_model.py FOLDER [--minutes N | --steps N]

FOLDER keeps the tokenizer, the prose as tokens, the checkpoint to go on from when the script is run again, and the
model (FOLDER/model, a Hugging Face checkpoint). Nothing is downloaded. The method: loong_jax/default_model/README.md.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    args = parse_args()
    if args.threads:
        # Before JAX is imported; one thread needs no pool.
        single = "--xla_cpu_multi_thread_eigen=false" if args.threads == 1 else ""
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {single}".strip()
        os.environ["NPROC"] = str(args.threads)
    from needle.model import Shape
    from needle.training import Schedule, train
    from tqdm import tqdm

    schedule = Schedule(seed=args.seed, steps=args.steps, minutes=args.minutes)
    train(args.folder, Shape(), schedule, tqdm.write)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, help="of training, over all runs; 110 unless --steps is given")
    parser.add_argument("--steps", type=int, help="of training, over all runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of the CPU; default: all")
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        args.minutes = 110.0
    return args


if __name__ == "__main__":
    main()

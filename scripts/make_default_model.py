"""Write the small default model (random weights, its own tokenizer) as a checkpoint directory.

python scripts/make_default_model.py DIRECTORY [--seed N]
"""

import argparse
from pathlib import Path

from loong_jax.model.default_model import make_default_model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_default_model(arguments.directory, seed=arguments.seed))


if __name__ == "__main__":
    main()

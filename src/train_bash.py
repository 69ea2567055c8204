"""The entry point of XVERSE's fine-tuning command: ``deepspeed --num_gpus=8 src/train_bash.py …``."""

import sys

from xverse.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))

"""Run ``xverse finetune`` several times in the processes of one launcher, which saves their start-up.

argv: a JSON list of runs, each a list of arguments; before the last, the launcher's FSDP setting is cleared.
"""

import json
import os
import sys

from xverse.cli import main

runs = json.loads(sys.argv[1])
for words in runs:
    if words is runs[-1]:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    code = main(["finetune", *words])
    if code:
        sys.exit(code)

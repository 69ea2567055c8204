"""Run ``xverse finetune`` several times in the processes of one launcher, which saves their start-up.

argv: a JSON list of runs, each a list of arguments. After the first, the launcher's FSDP setting is cleared.
"""

import json
import os
import sys

from xverse.cli import main

for words in json.loads(sys.argv[1]):
    code = main(["finetune", *words])
    if code:
        sys.exit(code)
    os.environ.pop("ACCELERATE_USE_FSDP", None)

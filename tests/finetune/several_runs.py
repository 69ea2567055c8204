"""Started by a launcher: ``xverse finetune`` several times in the same processes, which saves their start.

argv: a JSON list of runs, each a list of words. After the first, what the launcher said of FSDP is forgotten.
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

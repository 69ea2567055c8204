"""Text generation with base models, with the flags of XVERSE's published demo:

python text_generation_demo.py --port='port' --model_path='/path/to/model/' \\
    --tokenizer_path='/path/to/tokenizer/'
"""

import sys

from xverse.commands.demos import main

if __name__ == "__main__":
    sys.exit(main("generation"))

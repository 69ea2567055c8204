"""Integration with transformers: Auto classes, ``.chat``, attention, quantised weights."""

# First, because registering (at the end of its import) imports the modules of this package.
import transformers

from xverse.hf.classification import XverseForSequenceClassification
from xverse.hf.configuration import XverseConfig
from xverse.hf.modeling import XverseForCausalLM, XverseModel
from xverse.hf.tokenization import XverseTokenizer
from xverse.registration import install

install()  # again, because `import xverse` does nothing during an import of transformers

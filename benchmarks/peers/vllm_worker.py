"""The process in vLLM's environment: reads an order of ``vllm_check.py``, prints its answer."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # libraries print to stdout too; their output goes to stderr
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    order = json.load(sys.stdin)
    settings = SamplingParams(temperature=0, max_tokens=order["tokens"], logprobs=0, prompt_logprobs=0)
    inputs = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    answer: Any
    try:
        model = LLM(
            order["path"], dtype=order["dtype"], enforce_eager=True, max_model_len=1024, max_num_seqs=4,
            max_num_batched_tokens=1024, enable_prefix_caching=False,
        )  # fmt: skip
        answer = [_scores(output) for output in model.generate(inputs, settings, use_tqdm=False)]
    except Exception as error:
        answer = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    print(json.dumps(answer), file=answers, flush=True)


def _scores(output: Any) -> dict[str, Any]:
    """The reply, and the log-probabilities of all tokens but the first."""
    reply = list(output.outputs[0].token_ids)
    given = [line[token].logprob for token, line in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    )]  # fmt: skip
    chosen = [line[token].logprob for token, line in zip(reply, output.outputs[0].logprobs, strict=True)]
    return {"reply": reply, "logprobs": given + chosen}


if __name__ == "__main__":
    main()

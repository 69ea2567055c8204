"""llama-benchy: a short measurement must collect results."""

from cases import URL, case, command, run


@case
def measures():
    said = command(
        *("llama-benchy", "--base-url", URL, "--model", "nano", "--served-model-name", "nano"),
        *("--tokenizer", "gpt2", "--pp", "64", "--tg", "16", "--runs", "1", "--no-cache", "--skip-coherence"),
    )
    assert "No results" not in said, said[-300:]
    assert "tg16" in said or "tg" in said, said[-300:]


run()

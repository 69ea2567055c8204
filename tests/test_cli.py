"""The command line: fast help, one-line errors with the nearest name, exit codes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from xverse import __version__
from xverse.cli import VERBS, main


def xverse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "xverse.cli", *arguments], capture_output=True, text=True)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line of a mistaken command; checks the exit code."""
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse's own errors
        code = stopped.code if isinstance(stopped.code, int) else -1
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(arguments: list[str]) -> None:
    start = time.perf_counter()
    result = xverse(*arguments)
    elapsed = time.perf_counter() - start
    assert result.returncode == 0
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    assert elapsed < 3, "help imports something heavy; `make bench` holds the real bound"


def test_version() -> None:
    assert xverse("--version").stdout == f"xverse {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: xverse {verb}" in capsys.readouterr().out


def test_parsers_are_light() -> None:
    """Every verb's parser imports nothing heavy."""
    code = "import sys; from xverse.cli import VERBS, verb_parser; [verb_parser(verb) for verb in VERBS]; "
    code += (
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["doctr"], "unknown verb 'doctr'; did you mean 'doctor'?"),
        (["wxyz"], "unknown verb 'wxyz' (xverse --help"),
        (["--hepl"], "unknown argument '--hepl'; did you mean '--help'?"),
        (["chat", "--akc", "hi"], "unknown argument '--akc'; did you mean '--ask'?"),
        (["doctor", "--jsn"], "unknown argument '--jsn'; did you mean '--json'?"),
        (["doctor", "--json=3"], "--json"),
        (["doctor", "extra"], "too many arguments: extra"),
        (["doctor", "-q"], "unknown argument '-q'"),
        (["tokenizer", "trian"], "unknown choice 'trian'; did you mean 'train'?"),
        (["tokenizer", "train", "--vocab-sise", "9"], "did you mean '--vocab-size'?"),
        (["export", "--format", "lama"], "did you mean 'llama'?"),
        (["data", "show", "--dataset", "x", "--identity", "name"], "--identity 'name': expected KEY=VALUE"),
        (["plan", "--device=a100", "--gpus=8", "--layout=data=8,data=8"], "data is given twice"),
        (["plan", "--device=a100", "--gpus=8", "--shape=/"], "--shape /: no config.json in this folder"),
        (["export", "--model", "nano"], "the following arguments are required: --out"),
    ],
)
def test_mistakes(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "data show folder --dataset-dir=x",
        "data show folder --stage=pt",
        "data show folder --cutoff-len=99",
        "data show folder --identity name=x",
        "data show folder --model=x",
        "data show folder --index=3",
        "data show --dataset=x --mixture=y",
        "eval run --out=x --tasks=gsm8k --shots=3",
        "eval run --out=x --tasks=ppl --split=val",
        "eval run --out=x --tasks=ppl --skip-malformed",
        "eval run --out=x --tasks=ceval --fix-none",
        "eval run --out=x --tasks=mmlu --texts=x",
        "eval run --out=x --tasks=mmlu --allow-code",
        "plan --device=a100 --gpus=8 --layout=data=8 --top=3",
        "bench quality --imatrix=with",
        "bench quality --work-dir=x",
    ],
)
def test_flags_without_effect(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = arguments.split()[-1].partition("=")[0]
    flag = flag if flag.startswith("--") else "--identity"
    assert f"xverse: {flag} has no effect without" in refused(capsys, *arguments.split())


def test_what_a_message_quotes_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for control in ("\n", "\r", "\x0b", "\x1b[2J", "\x85", "\u2028", "\x00"):
        for arguments in ((f"a{control}b",), ("chat", f"--a{control}b"), ("plan", f"--shape=a{control}b")):
            line = refused(
                capsys, *arguments, *(["--device=a100", "--gpus=8"] if "plan" in arguments else [])
            )
            assert len(line.splitlines()) == 1
            assert line.rstrip("\n").isprintable()


def test_a_mistake_in_a_process() -> None:
    result = xverse("tokenizer", "train", "--out", "x", "--vocab-size", "many", "f.txt")
    assert result.returncode == 2
    assert result.stdout == ""
    assert (
        result.stderr
        == "xverse tokenizer train: argument --vocab-size: 'many' is not a whole number (at least 1)\n"
    )


def test_reader_that_leaves() -> None:
    """A reader that exits early, as in `xverse completion bash | head -1`, causes no traceback."""
    command = [sys.executable, "-m", "xverse.cli", "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0

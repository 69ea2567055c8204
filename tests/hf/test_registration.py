"""The snippet of XVERSE-7B's README on xverse's and on published directories; no foreign code runs."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Verbatim from XVERSE-7B's README, prompts taken off; only the path differs.
SNIPPET = """\
import torch
from transformers import AutoTokenizer, AutoModelForCausalLM
from transformers.generation.utils import GenerationConfig
model_path = "xverse/XVERSE-7B-Chat"
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True, torch_dtype=torch.bfloat16, device_map='auto')
model.generation_config = GenerationConfig.from_pretrained(model_path)
model = model.eval()
history = [{"role": "user", "content": "1955年谁是美国总统？他是什么党派？"}]
response = model.chat(tokenizer, history)
print(response)
history.append({"role": "assistant", "content": response})
history.append({"role": "user", "content": "他任职了多少年"})
response = model.chat(tokenizer, history)
print(response)
"""  # noqa: E501
REPORT = """
import json, sys
print("\\nREPORT", json.dumps({
    "class": type(model).__module__, "dtype": str(model.dtype), "history": history,
    "foreign": [name for name in sys.modules if name.startswith("transformers_modules.")],
    "hooks": sum(getattr(finder, "is_xverse_hook", False) for finder in sys.meta_path),
}))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Start = Callable[..., Callable[[], tuple[dict[str, Any], str]]]


def snippet(path: Path) -> str:
    return SNIPPET.replace('"xverse/XVERSE-7B-Chat"', repr(str(path)))


def start(program: str, **environment: str) -> Callable[[], tuple[dict[str, Any], str]]:
    """Start a program in parallel; the result waits for it and returns its report and output."""
    process = subprocess.Popen(
        [sys.executable, "-c", program + REPORT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )

    def wait() -> tuple[dict[str, Any], str]:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
        return json.loads(output.rsplit("REPORT", 1)[1]), output + errors

    return wait


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub API that transformers uses, for one repository."""

    directory: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.asked.append(path)
        headers = {"X-Repo-Commit": COMMIT}
        repository = "/xverse/XVERSE-7B-Chat"
        if path.startswith(f"/api/models{repository}/tree/"):
            body = json.dumps(
                [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                    for p in self.directory.iterdir()
                    if p.is_file()
                ]
            ).encode()
        elif path.startswith(f"/api/models{repository}"):
            siblings = [{"rfilename": item.name} for item in self.directory.iterdir()]
            body = json.dumps({"id": repository[1:], "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith(f"{repository}/resolve/"):
            file = self.directory / path.removeprefix(f"{repository}/resolve/").partition("/")[2]
            if not file.is_file():
                self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
                return
            body = file.read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        self.answer(200, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def hub(upstream: Path) -> Iterator[tuple[str, list[str]]]:
    """A loopback hub that serves the published directory as xverse/XVERSE-7B-Chat: address, requests."""
    asked: list[str] = []
    handler = type("Handler", (Hub,), {"directory": upstream, "asked": asked})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def runs(written: Path, upstream: Path, hub: tuple[str, list[str]], tmp_path_factory: Any) -> dict[str, Any]:
    """All programs in parallel, because each spends seconds on importing torch and transformers."""
    checks = "import importlib.util, importlib, sys, xverse\n"
    checks += "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
    checks += "importlib.reload(xverse)\nassert importlib.util.find_spec('transformers')\n"
    return {
        "written": start(snippet(written)),
        "published": start(checks + snippet(upstream) + "importlib.reload(xverse)\n"),
        "hub": start(
            "import transformers\nimport xverse\n" + SNIPPET,
            HF_ENDPOINT=hub[0],
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path_factory.mktemp("hub-home")),
        ),
    }


def check(report: dict[str, Any]) -> None:
    assert report["class"] == "xverse.hf.modeling"
    assert report["dtype"] == "torch.bfloat16"
    assert [message["role"] for message in report["history"]] == ["user", "assistant", "user"]
    assert report["hooks"] == 0


def test_published_directory_after_importing_xverse(runs: dict[str, Any]) -> None:
    report, output = runs["published"]()
    check(report)
    assert report["foreign"] == []
    assert "custom code" not in output  # no question
    assert "Warning" not in output


def test_hub_id_with_transformers_imported_first(runs: dict[str, Any], hub: tuple[str, list[str]]) -> None:
    report, output = runs["hub"]()
    check(report)
    assert report["foreign"] == []
    assert "custom code" not in output
    assert any(path.endswith(".bin") for path in hub[1])
    assert not any(path.endswith("_xverse.py") for path in hub[1])


def test_written_directory_without_importing_xverse(runs: dict[str, Any]) -> None:
    """The tokenizer's entry makes transformers ask whether to run the configuration's code; without an
    answer, as here, it continues without."""
    report, _ = runs["written"]()
    check(report)
    assert {name.rsplit(".", 1)[-1] for name in report["foreign"]} >= {"configuration_xverse"}


def test_no_code_of_a_published_directory_runs(upstream: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for trust in (None, True, False):
        assert (
            type(AutoConfig.from_pretrained(upstream, trust_remote_code=trust)).__module__
            == "xverse.hf.configuration"
        )
        assert (
            type(AutoTokenizer.from_pretrained(upstream, trust_remote_code=trust)).__module__
            == "xverse.hf.tokenization"
        )
        model = AutoModelForCausalLM.from_pretrained(upstream, trust_remote_code=trust)
        assert type(model).__module__ == "xverse.hf.modeling"
    again = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    assert type(again).__module__ == "xverse.hf.modeling"


def test_no_tokenizer_code_of_a_directory_runs(upstream: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "model"
    shutil.copytree(upstream, path)
    (path / "tokenization_own.py").write_text("raise RuntimeError('the directory's own code was run')")
    for auto_map in ({"AutoTokenizer": [None, "tokenization_own.Own"]}, [None, "tokenization_own.Own"]):
        values = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": auto_map}
        (path / "tokenizer_config.json").write_text(json.dumps(values))
        for trust in (None, True, False):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
            assert type(tokenizer).__module__ == "xverse.hf.tokenization"
        tokenizer.save_pretrained(tmp_path / "saved")
        assert "auto_map" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_other_models_keep_their_tokenizer_code(upstream: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tmp_path / "model"
    shutil.copytree(upstream, path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenization_own.py").write_text("raise RuntimeError('own code was run')")
    values = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match="own code was run"):
        AutoTokenizer.from_pretrained(path, trust_remote_code=True)


def test_published_tokenizer_is_repaired_and_saves_itself_sound(
    upstream: Path, tiny_texts: list[str], tmp_path: Path
) -> None:
    import tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from xverse.tokenizer import Tokenizer

    with pytest.raises(Exception, match=r"prepend_scheme|PyPreTokenizerTypeWrapper"):
        tokenizers.Tokenizer.from_file(str(upstream / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(upstream)
    ours = Tokenizer.load(upstream)  # not the original: the old format lacks "split": false
    for text in tiny_texts:
        assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 3)
    padded = tokenizer(["a", "a b c"], padding=True, padding_side="left")
    assert padded["input_ids"][0][0] == 1
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert stock("Hello 世界")["input_ids"] == tokenizer("Hello 世界")["input_ids"]


def test_other_models_keep_their_tokenizers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert type(AutoTokenizer.from_pretrained(tmp_path)).__module__.startswith("transformers.")


def test_a_transformers_that_does_not_fit_costs_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    from xverse import registration

    def refuse(*args: Any, **options: Any) -> None:
        raise AttributeError("no such table")

    monkeypatch.setattr(AutoConfig, "register", refuse)
    with pytest.warns(UserWarning, match="not registered with transformers"):
        registration.install()

"""What each metric counts, and that all are documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is your name?"}]
CHAT = "/v1/chat/completions"


def samples(text: str) -> dict[str, dict[str, float]]:
    """For each name of a sample: its values by labels."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_metrics(launch: Any) -> None:
    server = launch(max_waiting=1, stop_ids=())
    with server.client() as client:
        client.post(CHAT, json={"messages": QUESTION, "max_tokens": 5})
        client.post(CHAT, json={"messages": QUESTION, "max_tokens": 5, "stream": True})
        client.post(CHAT, json={"messages": QUESTION, "max_tokens": -1, "stream": True})
        client.get("/nothing/that/exists")
        endless = {"messages": QUESTION, "max_tokens": 4000, "stream": True}
        streams = [client.stream("POST", CHAT, json=endless) for _ in range(9)]
        replies = [stream.__enter__().iter_lines() for stream in streams]
        for reply in replies:
            next(reply)
        for streamed in (True, False):
            busy = client.post(CHAT, json={"messages": QUESTION, "stream": streamed})
            assert busy.status_code == 429
        during: dict[str, Any] = {}

        def all_are_there() -> bool:
            during.update(samples(client.get("/metrics").text))
            counts = (
                during[f"vllm:num_requests_{state}"]["model_name=nano"] for state in ("running", "waiting")
            )
            return tuple(counts) == (8, 1)

        server.until(all_are_there)
        for stream in streams:
            stream.__exit__(None, None, None)
        server.until(server.idle)
        server.until(lambda: 'status="499"} 9' in client.get("/metrics").text)
        after = samples(client.get("/metrics").text)
    model = "model_name=nano"
    assert during["vllm:num_requests_running"][model] == 8
    assert during["vllm:num_requests_waiting"][model] == 1
    assert 0 < during["vllm:kv_cache_usage_perc"][model] <= 1
    assert after["vllm:kv_cache_usage_perc"][model] == 0  # the prefix cache gives way
    route = f"handler={CHAT},method=POST"
    requests = after["http_requests_total"]
    assert requests[f"{route},status=200"] == 2
    assert requests[f"{route},status=400"] == 1
    assert requests[f"{route},status=429"] == 2
    assert requests[f"{route},status=499"] == 9  # the client left
    assert requests["handler=other,method=GET,status=404"] == 1
    assert after["http_request_duration_seconds_count"][route] == 14
    assert after["vllm:request_success_total"][f"finished_reason=length,{model}"] == 2
    assert after["xverse_reply_failures_total"][f"{model},reason=cancelled"] == 9
    for name in ("vllm:e2e_request_latency_seconds", "vllm:request_generation_tokens"):
        assert after[f"{name}_count"][model] == 2
    assert after["vllm:request_generation_tokens_sum"][model] == 10
    assert after["vllm:time_to_first_token_seconds_count"][model] >= 10
    assert after["vllm:prompt_tokens_total"] == after["vllm:prefix_cache_queries_total"]
    edges = [
        float(re.findall("le=([^,]+)", labels)[0])
        for labels in after["vllm:inter_token_latency_seconds_bucket"]
    ]
    least = min(edges)
    assert least == 0.001
    assert after["process_resident_memory_bytes"][""] > 1e8
    assert not [name for name in after if name.endswith("_created")]


def test_the_documentation_lists_every_metric(server: Any) -> None:
    with server.client() as client:
        names = re.findall(r"^# TYPE (\S+?)(?:_total)? ", client.get("/metrics").text, re.MULTILINE)
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`((?:vllm:|http_|xverse_|process_)\w+)", page))
    assert {name for name in names if not name.startswith("process_")} == {
        name for name in listed if not name.startswith("process_")
    }
